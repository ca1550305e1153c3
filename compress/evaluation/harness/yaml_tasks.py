"""The user's own evaluation as an lm-eval task YAML. Without --trust-code it is data: nothing that it names is run.

lm-eval executes what such a file names in several ways: `!function` tags, loading scripts, metrics that are fetched as
code, and templates that call Python. The first three are refused here; templates run in a sandbox (`templates`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from compress.artifact.canonical import sha256_json
from compress.errors import UserError
from compress.evaluation.harness.resolved import Resolved, reading_problem
from compress.evaluation.harness.scores import JUDGING
from compress.evaluation.suites import SuiteTask

_TRUST = "if you trust it, allow it with --trust-code"
_EXECUTES = ("class", "custom_dataset", "use_prompt", "unsafe_code", "process_docs", "process_results")
_BUILDERS = ("json", "csv", "text", "parquet", "arrow")
_METRICS = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "perplexity", "likelihood", "brier_score"}
_KINDS = ("multiple_choice", "loglikelihood", "generate_until")


class _Function(str):
    """The target of a `!function` tag, not looked up."""


class _Loader(yaml.SafeLoader):
    """Plain data, with `!function` tags kept as what they name."""


_Loader.add_constructor("!function", lambda loader, node: _Function(node.value))


def resolve_yaml(task: SuiteTask, *, trust_code: bool) -> Resolved:
    """A task file; its items are chosen once lm-eval has read the data.

    Raises:
        UserError: it cannot be read, is no task, is of a kind that has no right or wrong, or would execute something
            without `trust_code`.
    """
    path = Path(task.name)
    plain = _load(path, ())
    kind = plain.get("output_type", "generate_until")
    if not isinstance(plain.get("task"), str):
        raise UserError(f"{path} is no task of lm-eval: it has no name under `task`", "groups and lists are not read")
    if kind not in _KINDS:
        raise UserError(
            f"{path} is of the kind {kind!r}, whose items are neither right nor wrong",
            "score a text's perplexity with --data FILE",
        )
    if trust_code:
        from lm_eval.tasks._yaml_loader import load_yaml

        config = load_yaml(path, resolve_func=True)
    else:
        _refuse_code(plain, path)
        config = plain
    _check_judged(config, path)
    kwargs = dict(config.get("dataset_kwargs") or {})
    kwargs.pop("trust_remote_code", None)
    if "data_files" in kwargs:
        kwargs["data_files"] = _beside(kwargs["data_files"], path.parent)
    config = {**config, "dataset_kwargs": kwargs or None}
    return Resolved(
        name=str(plain["task"]),
        config={key: value for key, value in config.items() if key not in ("tag", "group")},
        config_sha256=sha256_json(_spelt(plain)),
        user=True,
        items=task.items,
        seed=task.seed,
    )


def _load(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The file with those it includes, local keys over included ones."""
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the task file {path}: {reading_problem(error)}", "give the path of an lm-eval YAML"
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}", "see lm-eval's task guide") from error
    if not isinstance(value, dict) or path.resolve() in seen:
        raise UserError(f"{path} is no task of lm-eval", "give a YAML mapping that does not include itself")
    included = value.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        merged.update(_load(path.parent / str(name), (*seen, path.resolve())))
    return {**merged, **value}


def _refuse_code(config: dict[str, Any], path: Path) -> None:
    for where, value in _leaves(config, ""):
        if isinstance(value, _Function):
            raise UserError(f"{path} executes the function {str(value)!r} ({where})", _TRUST)
    for key in _EXECUTES:
        if config.get(key):
            raise UserError(f"{path} executes code: `{key}` is {config[key]!r}", _TRUST)
    source = str(config.get("dataset_path") or "")
    local = Path(source).suffix == ".py" or source.startswith((".", "/", "~"))
    if not source or local or ("/" not in source and source not in _BUILDERS):
        raise UserError(
            f"{path} reads its data with {source or 'nothing'!r}, which may execute code",
            f"use one of {', '.join(_BUILDERS)} with data_files, or a data set on the hub (org/name); {_TRUST}",
        )
    for entry in config.get("metric_list") or []:
        name = entry.get("metric") if isinstance(entry, dict) else entry
        if name not in _METRICS or (isinstance(entry, dict) and entry.get("hf_evaluate")):
            raise UserError(
                f"{path} uses the metric {name!r}, which is fetched as code or scores no item right or wrong",
                f"use {', '.join(sorted(_METRICS))}; {_TRUST}",
            )


def _check_judged(config: dict[str, Any], path: Path) -> None:
    """Before the work: one of the metrics must call an item right or wrong. Without any, lm-eval's own for the kind do;
    what a `process_results` gives is seen only once it has run."""
    entries = config.get("metric_list") or []
    names = [str(entry.get("metric")) if isinstance(entry, dict) else str(entry) for entry in entries]
    if names and not config.get("process_results") and not set(names) & set(JUDGING):
        raise UserError(
            f"{path} has no metric that calls an item right or wrong (it has {', '.join(names)})",
            f"give it one of {', '.join(JUDGING)}",
        )


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{where}[{number}]")
    else:
        yield where, value


def _beside(files: Any, directory: Path) -> Any:
    """Relative data files that lie beside the YAML, as paths; others as they are."""
    if isinstance(files, dict):
        return {split: _beside(file, directory) for split, file in files.items()}
    if isinstance(files, list):
        return [_beside(file, directory) for file in files]
    return str(directory / files) if isinstance(files, str) and (directory / files).is_file() else files


def _spelt(value: Any) -> Any:
    """The configuration as plain JSON data."""
    if isinstance(value, dict):
        return {str(key): _spelt(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_spelt(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
