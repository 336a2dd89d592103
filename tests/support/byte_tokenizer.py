"""A tiny byte-level tokenizer, with merges across spaces as those of most models have."""

import tokenizers
import transformers

CORPUS = ["the answer is 42.", "Question: how many? Answer: the number is four.", "a b  c\n\nd é"]
BOS, EOS = 0, 1


def make_tokenizer(*, adds_bos=False, adds_eos=False, chat_template=None, eos_token="</s>"):
    """Byte-level BPE with merges across spaces, as the tokenizers of most models have."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS * 3, trainer)
    if adds_bos or adds_eos:
        single = "<s> " * adds_bos + "$A" + " </s>" * adds_eos
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos_token, chat_template=chat_template
    )


TOKENIZER = make_tokenizer()
