"""`python -m drlora_jax.evaluate --run DIR --tasks a,b`: evaluates a trained model.

  --tasks gsm8k,arc_easy            tasks by name, with data from --data-dir or the hub
  --tasks gsm8k=FILE                a task on a file of yours
  --loss FILE ...                   loss and perplexity on text, chat or prompt files
  --model PATH                      a base model instead of a run

Multiple choice: arc_easy, arc_challenge, boolq, openbookqa, piqa, siqa, winogrande, hellaswag, by
log-likelihood; with `:mixlora` by answer label, with `:instruct` by generating the answer. Also
gsm8k, loss, and with --allow-code-execution humaneval and mbpp. Other names run
lm-evaluation-harness.

Scores are printed and, for a run or with --out, written to eval.json, with one line per sample in
eval/. `python -m drlora_jax.evaluation.compare A.jsonl B.jsonl` compares two files of samples pair
by pair. A model that needs several machines is started on all of them, as for training
(docs/scaling.md).
Exit codes: 0 done, 2 a mistake in the input, 1 the evaluation failed, 75 another process was lost.
"""

import argparse
import json
import pathlib
import sys
from typing import NamedTuple

import jax

from drlora_jax import cli
from drlora_jax.config import RunSection, TrainConfig, apply_overrides, to_dict
from drlora_jax.errors import EXIT_DONE, UserError
from drlora_jax.evaluation import harness, results
from drlora_jax.evaluation import jobs as jobs_lib
from drlora_jax.evaluation.records import Score, Settings, text_hash
from drlora_jax.evaluation.sandbox import Sandbox
from drlora_jax.inference.model import Loaded
from drlora_jax.inference.words import Words, open_words
from drlora_jax.interop.hf_files import fingerprint
from drlora_jax.parallel import processes
from drlora_jax.parallel.agreement import check_agreement, digest, digest_settings
from drlora_jax.parallel.mesh import count_devices
from drlora_jax.parallel.watchdog import Watchdog
from drlora_jax.runs.provenance import versions
from drlora_jax.system.paths import local_path

OVERRIDES = ("mesh.", "data.")  # sections whose fields may be set besides the options


def main(argv=None) -> int:
    args = _parse(argv)
    limits = RunSection()
    processes.join(limits.heartbeat_timeout, hears_sigterm=False)
    count_devices()  # reports a mistake in the environment before any work
    with Watchdog(limits.stall_timeout) as watchdog:
        return _run(args, watchdog)


def _run(args: argparse.Namespace, watchdog: Watchdog) -> int:
    requests, others = jobs_lib.parse_requests(args.tasks, args.loss)
    if not requests and not others:
        raise UserError("Nothing to evaluate: give --tasks NAME,... or --loss FILE.")
    source = _source(args)
    folder = _folder(args)
    settings = settings_of(args)
    texts = jobs_lib.make_texts(settings, source.config, source.words, args.row_format)
    jobs = jobs_lib.prepare_jobs(requests, settings, source.config, texts)
    prepared = _harness_tasks(others, args, texts)
    _tell(source.words.notes)
    sandbox = Sandbox() if any(job.task.is_code for job in jobs) else None
    mesh = apply_overrides(TrainConfig(), _only(args, "mesh.")).mesh
    _check_processes_agree(args, source, jobs, others)
    watchdog.beat("loading the model")
    loaded = cli.load_model(args, mesh, source.words)._replace(on_batch=watchdog.again)
    watchdog.beat("evaluating")
    scores = _evaluate(jobs, settings, loaded, sandbox, folder) if jobs else []
    scores += _evaluate_harness(prepared, loaded, folder)
    if processes.is_main():
        print("\n".join([results.table(scores), *results.chance_lines(scores)]))
        if folder:
            results.write_scores(folder, scores)
    return EXIT_DONE


def _check_processes_agree(args, source: "_Source", jobs, others) -> None:
    """Raises RunError when the processes would not evaluate the same model on the same data."""
    if jax.process_count() == 1:
        return
    prompts = (text for job in jobs for item in job.items for text in job.task.strings(item))
    fields = {
        "settings": digest_settings(vars(args), others),
        "run": digest(source.run_digest),
        "step": digest(str(source.step)),
        "base": digest(fingerprint(source.words.directory)),
        "data": digest(*(job.data_fingerprint for job in jobs), text_hash(prompts)),
        "versions": digest(json.dumps(versions())),
    }
    check_agreement("on what to evaluate", fields)


def _evaluate(jobs, settings: Settings, loaded: Loaded, sandbox, folder) -> list[Score]:
    """Runs the tasks one after the other; samples are written as soon as a task has ended."""
    tools, adapter = jobs_lib.make_tools(loaded, settings, sandbox), jobs_lib.adapter_digest(loaded)
    found = []
    for job in jobs:
        samples, scores = jobs_lib.run_job(job, tools, adapter)
        if folder and processes.is_main():
            results.write_samples(folder, scores[0].samples, samples)
        found += scores
    return found


def _harness_tasks(names, args, texts) -> harness.Prepared | None:
    """Prepares tasks of lm-evaluation-harness, an optional package imported only for these."""
    if not names:
        return None
    return harness.prepare(
        names,
        settings_of(args),
        writer=texts.chat_writer() if args.chat else None,
        shots=args.shots,
        task_path=args.task_path,
    )


def _evaluate_harness(prepared: harness.Prepared | None, loaded: Loaded, folder) -> list[Score]:
    if prepared is None:
        return []
    found, adapter = [], jobs_lib.adapter_digest(loaded)
    for samples, scores in harness.run(prepared, loaded, adapter_fingerprint=adapter):
        if folder and samples and processes.is_main():
            results.write_samples(folder, scores[0].samples, samples)
        found += scores
    return found


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(
        seed=args.seed,
        limit=args.limit,
        shots=args.shots or 0,
        chat=args.chat,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        max_length=args.max_length,
        data_dir=args.data_dir,
        allow_code=args.allow_code_execution,
        template=None if args.template == "auto" else args.template,
        system=args.system,
    )


def _tell(notes) -> None:
    if processes.is_main():
        for note in notes:
            print(f"note: {note}", file=sys.stderr)


class _Source(NamedTuple):
    """Describes the model to evaluate."""

    config: TrainConfig | None  # the run's, with data settings overridden
    words: Words
    step: int | None = None  # step of the run's checkpoint
    run_digest: str = ""


def _source(args) -> _Source:
    """Finds the run and its base model. `latest` and `best` are resolved only here, since a
    training may be saving at the same time.
    """
    words = open_words(args)
    found = words.source
    if found is None:
        given = [each for each in args.overrides if each.startswith("data.")]
        config = apply_overrides(TrainConfig(), given) if given else None
        return _Source(config, words)
    config = apply_overrides(found.config, _only(args, "data."))
    run_digest = digest(json.dumps(to_dict(found.config)))
    return _Source(config, words, None if args.base else found.step, run_digest)


def _only(args, section: str) -> list[str]:
    return [override for override in args.overrides if override.startswith(section)]


def _folder(args) -> pathlib.Path | None:
    """Returns the directory for results, which is created and checked before any work."""
    if args.out is None and args.run is None:
        return None
    folder = local_path(args.out, "--out") if args.out else local_path(args.run, "--run")
    results.check_writable(folder)
    return folder


def _parse(argv) -> argparse.Namespace:
    parser = cli.model_parser("python -m drlora_jax.evaluate", __doc__)
    _add_tasks(parser.add_argument)
    _add_wording(parser.add_argument)
    parser.add_argument("overrides", nargs="*", metavar="mesh.field=value | data.field=value")
    args = parser.parse_intermixed_args(argv)
    for override in args.overrides:
        if not override.startswith(OVERRIDES):
            raise UserError(f"{override!r}: only mesh.field=value and data.field=value can be set.")
    return args


def _add_tasks(add) -> None:
    """Adds the options that select what is evaluated, and how much of it."""
    add("--tasks", metavar="NAME[=FILE],...", help="tasks; lm_eval:NAME is a harness task")
    add("--loss", metavar="FILE", nargs="+", default=[], help="files for loss and perplexity")
    add("--data-dir", metavar="DIR", help="directory with the files of tasks")
    add("--out", metavar="DIR", help="directory for results; default: the run directory")
    add("--limit", type=_positive, metavar="N", help="evaluate a seeded sample of N items per task")
    add("--seed", type=int, default=0, help="seed of the sample; default 0")
    add(
        "--shots",
        type=_natural,
        metavar="K",
        help="solved examples before each question; default: 0 for gsm8k, its own for a harness "
        "task",
    )
    add("--task-path", metavar="DIR", help="directory with definitions (.yaml) of harness tasks")
    add("--batch-size", type=_positive, default=8, metavar="B", help="rows computed at once")
    add("--max-new-tokens", type=_positive, metavar="N", help="default: the task's own")
    add(
        "--max-length", type=_positive, metavar="N", help="tokens per row; default: the run's, 2048"
    )


def _add_wording(add) -> None:
    """Adds the options on the wording of prompts, and the permission to run programs."""
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="write prompts as in the run's training, or for a base model with the tokenizer's "
        "chat template; --no-chat: use each task's plain prompts; default: generated answers as in "
        "training, multiple choice plain",
    )
    add("--system", metavar="TEXT", help="a system message before every question")
    add(
        "--template",
        metavar="NAME",
        default="auto",
        help="auto (default: the run's), none (texts as they are), or a name as in data.template",
    )
    add(
        "--format",
        dest="row_format",
        choices=("prompt_response", "alpaca", "chat", "text"),
        help="format of the training rows, for runs of earlier versions; default: the run's",
    )
    add(
        "--allow-code-execution",
        action="store_true",
        help="run the programs that the model writes for humaneval and mbpp",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return value


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


if __name__ == "__main__":
    cli.run_and_exit(main)
