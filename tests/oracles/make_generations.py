"""Makes `data/generations.json` with torch and transformers (Python 3.11):

pip install -e '.[oracle]' && python tests/oracles/make_generations.py
"""

import json
import pathlib
import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from tests.oracles.generations import (  # noqa: E402  (the path is set above)
    BUNDLED,
    CASES,
    NEW_TOKENS,
    PROMPTS,
    STORED,
    Case,
    write_case,
)


@torch.no_grad()
def generate(folder: pathlib.Path, case: Case, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers writes behind each prompt, from a directory of the case."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # transformers stops at what one place names: generation_config.json, else config.json. Only
    # where a case names more than that, all of it is handed in.
    is_single = sum([case.generation_config is not None, case.config is not None]) == 1
    given = {} if is_single and not case.has_eos else {"eos_token_id": list(case.ends)}
    answers = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        found = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=1,
            **given,
        )
        answers.append(found[0, len(prompt) :].tolist())
    return answers


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    stored = {"prompts": prompts, "answers": {}}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            directory = write_case(pathlib.Path(folder) / "model", case)
            stored["answers"][name] = generate(directory, case, prompts)
            print(name, [len(answer) for answer in stored["answers"][name]])
    STORED.write_text(json.dumps(stored) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
