"""`python -m drlora_jax.generate --run DIR --prompt TEXT`: answers prompts with a run's model.

Without --prompt or --messages it reads prompts line by line, on a terminal or from a pipe. Prompts
are formatted as in the run's training: same template, chat template and date. --messages takes rows
as training does, with history, system message and tools. On a terminal a single answer is streamed.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence

from drlora_jax import cli
from drlora_jax.config import DataSection
from drlora_jax.data.file_readers import read_stream
from drlora_jax.data.report import by_rows
from drlora_jax.data.segments import BadRow
from drlora_jax.data.sources import read_rows
from drlora_jax.data.templates import AS_IS
from drlora_jax.data.wording import Prompt, Wording, Writer, named_wording, resolve_wording
from drlora_jax.errors import EXIT_DONE, UserError
from drlora_jax.inference.generation import Generation, Generator, Sampling
from drlora_jax.inference.words import Words, open_words
from drlora_jax.runs.resolved import asked_wording, system_note
from drlora_jax.system import early

STANDARD_INPUT = "-"


def main(argv=None) -> int:
    args = _parse(argv)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    sampling.check()
    cli.check_positive(args, "max_new_tokens", "batch_size")
    words = open_words(args)
    asker = Asker(words, args)
    asked = asker.asked()  # mistakes in prompts are reported before weights are read
    for note in [*words.notes, *asker.notes()]:
        print(f"note: {note}", file=sys.stderr)
    loaded = cli.load_model(args, words=words)
    size = min(args.batch_size, len(asked)) or 1
    generator = Generator(loaded, batch_size=size)

    def answer(prompts: Sequence[Prompt], labels: Sequence[str]) -> None:
        streams = len(prompts) == 1 and sys.stdout.isatty()
        results = generator.generate(
            [prompt.ids for prompt in prompts],
            max_new_tokens=args.max_new_tokens,
            stop=tuple(args.stop or ()),
            sampling=sampling,
            seed=args.seed,
            on_text=(lambda _, text: print(text, end="", flush=True)) if streams else None,
        )
        _show(labels, results, streams)

    if asked or args.messages:
        answer([prompt for prompt, _ in asked], [label for _, label in asked])
    else:
        _interact(lambda text: answer([asker.question(text)], [text]))
    return EXIT_DONE


class Asker:
    """Writes prompts as a run, or a base model, expects them."""

    def __init__(self, words: Words, args: argparse.Namespace):
        self._words, self._args, self._tokenizer = words, args, words.tokenizer
        template = None if args.template == "auto" else args.template
        like = None
        if words.is_run:
            like = words.wording(template, args.row_format)
        elif template is None and args.row_format is None:
            template = "tokenizer" if words.has_chat_template else AS_IS
            like = named_wording(template, self._tokenizer)
            template = None
        self._named = template is not None or args.row_format is not None
        self.wording = asked_wording(template, args.row_format, self._tokenizer, like)
        self._writer = Writer(self.wording, self._tokenizer)
        self._unread = Counter()  # rows of --messages per unread field
        takes_input = "alpaca" in (self.wording.format, self.wording.template)
        if args.input is not None and words.is_run and not takes_input:
            raise UserError(
                "--input is the second field of Alpaca rows, but these prompts have the format "
                f"{self.wording.format}. Put the text into --prompt."
            )

    def notes(self) -> list[str]:
        notes = []
        known = self._words.known_wording
        if known is not None and self.wording.template != known.template:
            notes.append(
                f"prompts use the template {self.wording.template}, but the run was trained with "
                f"{known.template}"
            )
        if self._args.system is None and not self._args.messages and not self.wording.is_as_is:
            note = system_note(self._words.resolved)
            notes += [note] if note else []
        if self._unread:
            fields = by_rows(self._unread)
            notes.append(f"{self._args.messages}: fields that are not read: {fields}")
        return notes

    def asked(self) -> list[tuple[Prompt, str]]:
        """Returns the prompts of the command line, each with its label in the output."""
        if self._args.messages is not None:
            return [self._row(row) for row in _rows(self._args.messages)]
        return [(self.question(text), text) for text in self._args.prompt or []]

    def question(self, text: str) -> Prompt:
        return self._writer.question(text, extra=self._args.input or "", system=self._args.system)

    def _row(self, row) -> tuple[Prompt, str]:
        wording = self.wording
        try:
            wording = self._wording_of(row.fields)
            writer = Writer(wording, self._tokenizer)
            prompt = writer.row_prompt(row.fields, system=self._args.system)
        except (BadRow, UserError) as error:
            hint = ""
            if isinstance(error, BadRow) and error.reason == "missing field":
                by = ", the format of the run's rows" if self._words.is_run else ""
                hint = f" It was read as {wording.format}{by}; set another one by --format NAME."
            raise UserError(f"{row.where}: {str(error).rstrip('.')}.{hint}") from error
        self._unread.update(prompt.unread)
        return prompt, prompt.text

    def _wording_of(self, fields: dict) -> Wording:
        """Returns the run's own wording of such rows, or for a base model the one that the fields
        suggest.
        """
        if self._words.resolved is not None and not self._named:
            return self._words.resolved.wording_of(fields)
        if self._words.is_run or self._args.row_format is not None:
            return self.wording
        section = DataSection(special_tokens="split")
        found = resolve_wording(fields, section, self._tokenizer, date=self.wording.date)
        template = self.wording.template if self._named else None
        return asked_wording(template, None, self._tokenizer, found)


def _rows(path: str) -> list:
    rows = (
        read_stream("standard input", sys.stdin.buffer)
        if path == STANDARD_INPUT
        else read_rows(path)
    )
    return list(rows)


def _parse(argv) -> argparse.Namespace:
    parser = cli.model_parser("python -m drlora_jax.generate", __doc__)
    add = parser.add_argument
    add("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    add("--input", metavar="TEXT", help="the input of an Alpaca instruction")
    add("--system", metavar="TEXT", help="a system message before every prompt")
    add(
        "--messages",
        metavar="FILE.jsonl",
        help="rows as in training, whose last answer is ignored; - is standard input",
    )
    add(
        "--template",
        default="auto",
        help="auto (default: the run's), none (texts as they are), or a name as in data.template",
    )
    add(
        "--format",
        dest="row_format",
        choices=("prompt_response", "alpaca", "chat", "text"),
        help="format of the rows, for runs of earlier versions; default: the run's",
    )
    add("--max-new-tokens", type=int, default=256, help="limit per answer; default 256")
    add("--stop", action="append", metavar="TEXT", help="text that ends an answer; may be repeated")
    add("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    add("--top-k", type=int, help="sample only from the K likeliest tokens")
    add("--top-p", type=float, help="sample only from the likeliest tokens with this probability")
    add("--seed", type=int, default=0, help="seed of sampling; default 0")
    add("--batch-size", type=int, default=8, help="prompts answered at once; default 8")
    args = parser.parse_args(argv)
    if "" in (args.stop or ()):
        raise UserError("--stop is empty and would end every answer before its first token.")
    if args.prompt and args.messages is not None:
        raise UserError("Give --prompt or --messages, not both.")
    if args.input is not None and args.messages is not None:
        raise UserError("--input goes with --prompt; rows of --messages have a field `input`.")
    return args


def _interact(answer: Callable[[str], None]) -> None:
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("One prompt per line; an empty line or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            with early.raising():
                text = input("> " if is_terminal else "")
        except (EOFError, KeyboardInterrupt):
            return
        except UnicodeDecodeError as error:
            raise UserError(f"The prompt on standard input is not UTF-8: {error}.") from None
        cli.check_text("The prompt on standard input", text)
        if text.strip():
            answer(text)
        elif is_terminal:
            return


def _show(labels: Sequence[str], results: list[Generation], streams: bool) -> None:
    if streams:
        print()
        return
    for label, result in zip(labels, results, strict=True):
        if len(labels) > 1:
            print(f"> {label}")
        print(result.text)
        if result.finish == "length":
            print(f"[cut at {len(result.tokens)} tokens: --max-new-tokens]", file=sys.stderr)


if __name__ == "__main__":
    cli.run_and_exit(main)
