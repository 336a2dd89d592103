"""`python -m drlora_jax.generate --run DIR --prompt TEXT`: answers prompts with a run's model.

Without --prompt it reads prompts line by line, on a terminal or from a pipe. A prompt is written
with the template that the run was trained with (--template none takes the text as it is). On a
terminal a single answer is shown as it is made.
"""

import argparse
import sys
from collections.abc import Callable

from drlora_jax import cli, early
from drlora_jax.data.templates import PROMPT_TEMPLATES, choose_template, render_prompt
from drlora_jax.data.tokenize import encode_prompt
from drlora_jax.errors import EXIT_DONE, UserError
from drlora_jax.generation import Generation, Generator, Sampling
from drlora_jax.loaded import Loaded

AS_IT_IS = "none"


def main(argv=None) -> int:
    args = _parse(argv)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    sampling.check()
    cli.check_positive(args, "max_new_tokens", "batch_size")
    loaded = cli.load_model(args)
    write = prompt_writer(loaded, args.template)
    prompts = args.prompt or []
    size = min(args.batch_size, len(prompts)) or 1
    generator = Generator(loaded, batch_size=size)

    def answer(texts: list[str]) -> None:
        streams = len(texts) == 1 and sys.stdout.isatty()
        results = generator.generate(
            [encode_prompt(write(text), loaded.tokenizer) for text in texts],
            max_new_tokens=args.max_new_tokens,
            stop=tuple(args.stop or ()),
            sampling=sampling,
            seed=args.seed,
            on_text=(lambda _, text: print(text, end="", flush=True)) if streams else None,
        )
        _show(texts, results, streams)

    if prompts:
        answer(prompts)
    else:
        _interact(answer)
    return EXIT_DONE


def prompt_writer(loaded: Loaded, template: str) -> Callable[[str], str]:
    """What writes a prompt out: `auto` is the run's own template, or the tokenizer's chat template
    for a base without a run, or nothing at all.
    """
    tokenizer, config = loaded.tokenizer, loaded.config
    row_format = "prompt_response"
    if template == "auto" and config is None:
        template = "tokenizer" if getattr(tokenizer, "chat_template", None) else AS_IT_IS
    elif template == "auto":
        template = config.data.template
        if config.data.format != "auto":
            row_format = config.data.format
        if row_format in ("text", "choice"):
            template = AS_IT_IS
    if template == AS_IT_IS:
        return lambda text: text
    if row_format == "chat" and template in PROMPT_TEMPLATES:
        row_format = "prompt_response"
    resolved = choose_template(template, row_format, tokenizer)
    return lambda text: render_prompt(text, template=resolved, tokenizer=tokenizer)


def _parse(argv) -> argparse.Namespace:
    parser = cli.model_parser("python -m drlora_jax.generate", __doc__)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given often")
    parser.add_argument(
        "--template",
        default="auto",
        help="auto (default: the run's), none, or a name as in data.template",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="ends an answer")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default): the likeliest token always"
    )
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8, help="prompts answered at once")
    return parser.parse_args(argv)


def _interact(answer: Callable[[list[str]], None]) -> None:
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("One prompt a line; an empty line or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            with early.raising():
                text = input("> " if is_terminal else "")
        except (EOFError, KeyboardInterrupt):
            return
        except UnicodeDecodeError as error:
            raise UserError(f"The prompt on standard input is not UTF-8: {error}.") from None
        if text.strip():
            answer([text])
        elif is_terminal:
            return


def _show(texts: list[str], results: list[Generation], streams: bool) -> None:
    if streams:
        print()
        return
    for text, result in zip(texts, results, strict=True):
        if len(texts) > 1:
            print(f"> {text}")
        print(result.text)
        if result.finish == "length":
            print(f"[cut at {len(result.tokens)} tokens: --max-new-tokens]", file=sys.stderr)


if __name__ == "__main__":
    cli.run_and_exit(main)
