"""Converts the logs of lm-evaluation-harness to our samples and scores.

The harness logs one entry per document and filter (a filter extracts an answer from a text). The
values are those of the harness. Standard errors are ours: in closed form where a metric is a mean,
a ratio or the exponential of one, otherwise by bootstrapping documents, in this process.
"""

import json
import math
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from drlora_jax.evaluation import statistics
from drlora_jax.evaluation.records import Sample, Score

NO_FILTER = "none"  # as the harness names it
DRAWS = 100  # bootstrap samples, for metrics without a closed form
Entry = Mapping[str, Any]  # entry of the harness's log


class Value(NamedTuple):
    """Holds the value of one metric of a task."""

    metric: str
    value: float
    n: int
    stderr: float | None
    ci95: tuple[float, float] | None


class Part(NamedTuple):
    """Holds the contribution of one document to a metric that is a mean, or a function of one."""

    value: float
    weight: float
    name: str  # name of the value, which may differ from the metric


def values_of(task, entries: Sequence[Entry], row: Mapping[str, Any]) -> list[Value]:
    """Returns the metrics of a task's row of results, with standard errors."""
    found = []
    for key, value in row.items():
        metric, _, chosen = key.rpartition(",")
        if not metric or metric.endswith("_stderr") or not isinstance(value, numbers.Real):
            continue
        items = [each[metric] for each in entries if each["filter"] == chosen and metric in each]
        known = _estimate(_aggregation(task, metric), items)
        found.append(Value(_name(metric, chosen), float(value), len(items), *known))
    return found


def group_values(group, row: Mapping[str, Any], scores: Sequence[Score]) -> list[Value]:
    """Returns the metrics of a group; the errors of its tasks are independent and add by weight."""
    by_size = {config.metric: config.weight_by_size for config in group.aggregate_metric_list}
    found = []
    for key, value in row.items():
        metric, _, chosen = key.rpartition(",")
        if not metric or metric.endswith("_stderr") or not isinstance(value, numbers.Real):
            continue
        name = _name(metric, chosen)
        parts = [score for score in scores if score.metric == name]
        weights = np.array([score.n if by_size[metric] else 1 for score in parts], np.float64)
        known = (None, None)
        if all(score.stderr is not None for score in parts):
            errors = np.array([score.stderr for score in parts])
            known = _interval(float(value), float(np.linalg.norm(weights * errors) / weights.sum()))
        found.append(Value(name, float(value), sum(score.n for score in parts), *known))
    return found


def samples_of(task, entries: Sequence[Entry]) -> list[Sample]:
    """Returns one sample per document, with the results of all filters."""
    by_document: dict[int, list[Entry]] = {}
    for entry in entries:
        by_document.setdefault(entry["doc_id"], []).append(entry)
    return [_sample(task, number, by_document[number]) for number in sorted(by_document)]


def asked_texts(entries: Sequence[Entry]) -> list[str]:
    """Returns all texts that the model received, in order, for the prompt hash."""
    texts = []
    for entry in entries:
        if entry["filter"] == entries[0]["filter"]:
            for part in (part for argument in entry["arguments"] for part in argument):
                texts.append(part if isinstance(part, str) else _plain_text(part))
    return texts


def _name(metric: str, chosen: str) -> str:
    return metric if chosen == NO_FILTER else f"{metric},{chosen}"


def _aggregation(task, metric: str) -> Callable | None:
    """Returns the harness's aggregation of a metric; None: the mean."""
    return task.aggregation().get(metric)


def _part(aggregation: Callable | None, item: Any, metric: str) -> Part | None:
    """Returns a document's contribution to a metric; None if that is no function of a mean."""
    match getattr(aggregation, "__name__", "mean"), item:
        case "mean", bool() | numbers.Real():
            return Part(float(item), 1.0, metric)
        case "perplexity", numbers.Real():
            return Part(-float(item), 1.0, f"log_{metric}")
        case "weighted_perplexity", (total, weight):
            return Part(-total / weight, float(weight), f"log_{metric}")
        case "bits_per_byte", (total, weight):
            return Part(-total / weight / math.log(2), float(weight), metric)
    return None


def _estimate(aggregation: Callable | None, items: Sequence) -> tuple:
    """Returns standard error and 95 % interval."""
    parts = [_part(aggregation, item, "metric") for item in items]
    if any(part is None for part in parts):
        return _drawn(aggregation, items)
    estimate = statistics.estimate([part.value for part in parts], [part.weight for part in parts])
    if parts[0].name.startswith("log_"):
        estimate = statistics.exponential(estimate)
    return estimate.stderr, estimate.ci95


def _drawn(aggregation: Callable, items: Sequence) -> tuple:
    """Returns standard error and interval by bootstrap, drawing documents with replacement."""
    if len(items) < 2:
        return None, None
    draw = np.random.default_rng(0)
    picks = draw.integers(0, len(items), size=(DRAWS, len(items)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a draw may contain a single class
        values = [aggregation([items[index] for index in pick]) for pick in picks]
    return _interval(float(aggregation(list(items))), float(np.std(values, ddof=1)))


def _interval(value: float, stderr: float) -> tuple[float, tuple[float, float]]:
    return stderr, (value - statistics.Z95 * stderr, value + statistics.Z95 * stderr)


def _sample(task, number: int, entries: Sequence[Entry]) -> Sample:
    parts = {}
    for entry in entries:
        for metric in entry["metrics"]:
            part = _part(_aggregation(task, metric), entry[metric], metric)
            if part is not None:
                parts[_name(part.name, entry["filter"])] = part
    # A sample has one weight: of the words and bytes of a text, the number of bytes.
    weight = max((part.weight for part in parts.values()), default=1.0)
    values = {name: part.value for name, part in parts.items() if part.weight == weight}
    return Sample(str(number), values, _fields(entries), weight)


def _fields(entries: Sequence[Entry]) -> dict:
    """Returns requests and answers as JSON values."""
    first = entries[0]
    arguments = [tuple(each) for each in first["arguments"]]
    answers = [each[0] if len(each) == 1 else each for each in first["resps"]]
    fields = {"target": first["target"]}
    if all(len(each) == 1 for each in arguments):  # a text whose every token is predicted
        fields |= {"text": [each[0] for each in arguments], "loglikelihoods": answers}
        return _plain(fields)
    prompts = [each[0] for each in arguments]
    fields["prompt"] = prompts[0] if len(set(prompts)) == 1 else prompts
    if all(isinstance(each[1], str) for each in arguments):
        fields["choices"] = [each[1] for each in arguments]
        fields["loglikelihoods"] = [total for total, _ in answers]
        fields["is_greedy"] = [is_greedy for _, is_greedy in answers]
        return _plain(fields)
    fields["text"] = answers[0] if len(answers) == 1 else answers
    fields["extracted"] = {each["filter"]: each["filtered_resps"] for each in entries}
    return _plain(fields)


def _plain(value: Any) -> Any:
    return json.loads(_plain_text(value))


def _plain_text(value: Any) -> str:
    return json.dumps(value, default=_known)


def _known(value: Any) -> Any:
    """Converts NumPy numbers to numbers, and anything else to its repr."""
    return value.item() if isinstance(value, np.generic) else repr(value)
