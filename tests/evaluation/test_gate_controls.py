"""Negative controls through the command line: each kind of bad release is refused with its own exit code."""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from safetensors.torch import load_file, save_file

from compress.cli import main
from compress.evaluation.evaluate import evaluate
from compress.evaluation.gate import gate
from compress.evaluation.records import EvalRecord, write_record
from compress.evaluation.verdict import read_verdict, write_verdict
from tests.evaluation.gate_records import model, task
from tests.evaluation.gate_records import record as made
from tests.evaluation.gate_records import text as made_text


@dataclass(frozen=True)
class Result:
    """What one command line gave."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """`run(*words)`: `compress gate WORDS` in an empty directory, outside of any CI."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)

    def call(*words: object) -> Result:
        capsys.readouterr()
        code = main(["gate", *(str(word) for word in words)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    return call


POLICY = """
version = 1
data = "{data}"
max_tokens = {tokens}
gate = [
  {{id = "kl", kind = "kl_mean", max = {kl}}},
  {{id = "ppl", kind = "ppl_ratio", max_increase = 1.0}},
]
"""


@pytest.fixture
def policy(tmp_path: Path, text: Path) -> Path:
    """A policy that the tiny model at 4 bits passes."""
    path = tmp_path / "policy.toml"
    path.write_text(POLICY.format(data=text, tokens=6000, kl=0.5))
    return path


@pytest.fixture
def scored(record: EvalRecord, tmp_path: Path) -> Path:
    """An eval.json of the tiny model at 4 bits."""
    path = tmp_path / "eval.json"
    write_record(record, path)
    return path


def test_a_good_candidate_passes(run: Callable[..., Result], scored: Path, policy: Path) -> None:
    assert run(scored, "--policy", policy).code == 0


def test_two_bits_fail(run: Callable[..., Result], packaged_model: Path, rounded: Callable[..., Path]) -> None:
    (Path.cwd() / "quick.toml").write_text(POLICY.format(data="tales_heldout", tokens=4200, kl=0.02))
    assert run(rounded(packaged_model, 2, 128), "--baseline", packaged_model, "--policy", "quick.toml").code == 1


def test_a_zeroed_block_fails(run: Callable[..., Result], packaged_model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(packaged_model, tmp_path / "zeroed"))
    tensors = load_file(copy / "model.safetensors")
    for name in tensors:
        if ".layers.3." in name:
            tensors[name] = tensors[name] * 0
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    (tmp_path / "quick.toml").write_text(POLICY.format(data="tales_heldout", tokens=4200, kl=0.02))
    result = run(copy, "--baseline", packaged_model, "--policy", "quick.toml", "--json")
    assert result.code == 1
    assert json.loads(result.out)["verdict"] == "FAIL"


@pytest.fixture
def swapped(damaged: Path, tmp_path: Path) -> Path:
    """The tiny model at 4 bits with two tokens that have changed places."""
    copy = Path(shutil.copytree(damaged, tmp_path / "swapped"))
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [name for name, index in vocabulary.items() if index in (70, 71)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    return copy


def test_a_swapped_tokenizer_is_refused(run: Callable[..., Result], tiny: Path, swapped: Path, policy: Path) -> None:
    result = run(swapped, "--baseline", tiny, "--policy", policy)
    assert result.code == 5
    assert "different tokenizers" in result.err


TASK_ONLY = """
version = 1
gate = [{id = "task", kind = "accuracy_paired", task = "task", margin = 50.0}]
"""


def test_a_swapped_tokenizer_is_refused_where_tasks_alone_are_scored(
    run: Callable[..., Result], tiny: Path, swapped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(swapped), "--baseline", str(tiny), "--tasks", "blimp:4", "--output", "swap.json"]) == 5
    assert "different tokenizers" in capsys.readouterr().err
    assert not (tmp_path / "swap.json").exists()
    (tmp_path / "p.toml").write_text(TASK_ONLY)
    honest = made(texts=[], tasks=[task(700, 260, 20, 20)])
    write_record(honest, tmp_path / "eval.json")
    assert run("eval.json", "--policy", "p.toml").code == 0
    other = honest.model.model_copy(update={"tokenizer_sha256": "a" * 64})
    write_record(honest.model_copy(update={"model": other}).sealed(), tmp_path / "eval.json")
    result = run("eval.json", "--policy", "p.toml")
    assert result.code == 5
    assert "different tokenizers" in result.err
    served = honest.model.model_copy(update={"tokenizer_sha256": None})
    write_record(honest.model_copy(update={"model": served}).sealed(), tmp_path / "eval.json")
    assert run("eval.json", "--policy", "p.toml").code == 0  # behind an address: not known


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_eval_file_is_refused(run: Callable[..., Result], scored: Path, policy: Path, keep: float) -> None:
    data = scored.read_bytes()
    scored.write_bytes(data[: int(keep if keep >= 1 else keep * len(data))])
    assert run(scored, "--policy", policy).code == 5


def test_an_edited_eval_file_is_refused(run: Callable[..., Result], scored: Path, policy: Path) -> None:
    document = json.loads(scored.read_text())
    document["texts"][0]["clusters"]["kl"][0] *= 0.5
    scored.write_text(json.dumps(document))
    result = run(scored, "--policy", policy)
    assert result.code == 5
    assert "was edited" in result.err


def test_equal_log_probabilities_of_other_weights_are_refused(
    run: Callable[..., Result], tiny: Path, text: Path, policy: Path, tmp_path: Path
) -> None:
    same = evaluate(tiny, tiny, data=text, device="cpu")
    write_record(same, tmp_path / "same.json")
    assert run("same.json", "--policy", policy).code == 0
    posing = same.model.model_copy(update={"digest": "b" * 64})
    write_record(same.model_copy(update={"model": posing}).sealed(), tmp_path / "posing.json")
    result = run("posing.json", "--policy", policy)
    assert result.code == 5
    assert "answers exactly as" in result.err
    policy.write_text("allow_identical = true\n" + policy.read_text())
    assert run("posing.json", "--policy", policy).code == 0


def test_a_tampered_artifact_is_refused(run: Callable[..., Result], artifact: Path, tiny: Path, policy: Path) -> None:
    weights = artifact / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    assert run(artifact, "--baseline", tiny, "--policy", policy).code == 5


UNDERPOWERED = """
version = 1
gate = [
  {id = "task", kind = "accuracy_paired", task = "task", margin = 1.0},
]
"""


def test_an_underpowered_policy_is_refused_beforehand_and_inconclusive_afterwards(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "p.toml").write_text(UNDERPOWERED)
    write_record(made(tasks=[task(350, 125, 12, 13)]), tmp_path / "small.json")
    planned = run("small.json", "--policy", "p.toml", "--plan")
    assert planned.code == 2
    assert planned.out == ""
    assert "cannot be decided: task: needs 3," in planned.err
    assert "has 500" in planned.err
    assert "smallest true loss" in planned.err
    gated = run("small.json", "--policy", "p.toml")
    assert (gated.code, gated.out.splitlines()[-1]) == (3, "INCONCLUSIVE")
    assert "for 1 point at flips 5%; has 500" in gated.out
    write_record(made(tasks=[task(7000, 2500, 240, 260)]), tmp_path / "large.json")
    assert run("large.json", "--policy", "p.toml", "--plan", "--json").code == 0
    assert run("large.json", "--policy", "p.toml").code == 0


HOPELESS = [
    ('suite = "smoke"', '{id = "g", kind = "speed_ratio", min = 1.0}', "does not score"),
    ('suite = "smoke"', '{id = "g", kind = "generation_identical", min = 0.5}', "does not score"),
    ('suite = "smoke"', '{id = "g", kind = "kl_mean", max = 1.0, text = "wikitext-2"}', "does not score"),
    ("max_tokens = 1600", '{id = "g", kind = "kl_mean", max = 1.0}', "an interval needs 5"),
    ("max_tokens = 2900", '{id = "g", kind = "kl_p999", max = 1.0}', "needs 2,995 tokens"),
]


@pytest.mark.parametrize(("data", "gate", "message"), HOPELESS)
def test_a_policy_that_nothing_could_decide_is_refused_beforehand(
    run: Callable[..., Result], tmp_path: Path, data: str, gate: str, message: str
) -> None:
    (tmp_path / "p.toml").write_text(f"version = 1\n{data}\ngate = [{gate}]\n")
    result = run("--plan", "--policy", "p.toml")
    assert (result.code, result.out) == (2, "")
    assert message in " ".join(result.err.split())


def test_kl_between_two_files_that_do_not_hold_it_is_refused(
    run: Callable[..., Result], tiny: Path, damaged: Path, text: Path, policy: Path, tmp_path: Path
) -> None:
    for name, path in (("candidate", damaged), ("base", tiny)):
        write_record(evaluate(path, data=text, device="cpu"), tmp_path / f"{name}.json")
    result = run("candidate.json", "--baseline", "base.json", "--policy", policy)
    assert result.code == 5
    assert "lock-step" in result.err
    assert "compress eval CANDIDATE --baseline BASELINE" in result.err


def test_waivers_end(run: Callable[..., Result], scored: Path, policy: Path) -> None:
    policy.write_text(policy.read_text().replace("max = 0.5", "max = 1e-9"))
    plain = policy.read_text()
    assert run(scored, "--policy", policy).code == 1
    today = datetime.datetime.now(datetime.UTC).date()
    for days, code in ((30, 0), (-2, 1)):
        until = (today + datetime.timedelta(days=days)).isoformat()
        policy.write_text(f'{plain}\n[[waiver]]\ngate = "kl"\nuntil = {until}\nreason = "issue 42"\n')
        result = run(scored, "--policy", policy)
        assert result.code == code
        assert "issue 42" in result.err + result.out


def test_a_verdict_file_repeats_its_code_and_reports_are_written(
    run: Callable[..., Result], scored: Path, policy: Path, tmp_path: Path
) -> None:
    policy.write_text(policy.read_text().replace("max = 0.5", "max = 1e-9"))
    outputs = ("--output", "v.json", "--junit", "v.xml", "--markdown", "v.md")
    assert run(scored, "--policy", policy, *outputs).code == 1
    suite = ElementTree.parse(tmp_path / "v.xml").getroot()
    assert int(suite.attrib["failures"]) == 1
    assert "FAIL" in (tmp_path / "v.md").read_text()
    checked = run("--check", "v.json", "--json")
    assert checked.code == 1
    assert json.loads(checked.out) == json.loads((tmp_path / "v.json").read_text())
    assert run(scored, "--check", "v.json", "--policy", policy).code == 1
    document = json.loads((tmp_path / "v.json").read_text())
    document["verdict"] = "PASS"
    (tmp_path / "v.json").write_text(json.dumps(document))
    assert run("--check", "v.json").code == 5
    assert run("--check", "nothing.json").code == 2


def test_a_forged_verdict_is_refused(run: Callable[..., Result], scored: Path, policy: Path, tmp_path: Path) -> None:
    policy.write_text(policy.read_text().replace("max = 0.5", "max = 1e-9"))
    assert run(scored, "--policy", policy, "--output", "v.json").code == 1
    verdict = read_verdict(tmp_path / "v.json")
    gates = [gate.model_copy(update={"verdict": "PASS"}) for gate in verdict.gates]
    write_verdict(verdict.model_copy(update={"verdict": "PASS", "gates": gates}).sealed(), tmp_path / "v.json")
    for words in ((), ("--policy", policy), (scored, "--policy", policy)):
        result = run(*words, "--check", "v.json")
        assert (result.code, result.out) == (5, "")


def test_a_waiver_is_not_revived_by_a_backdated_verdict(
    run: Callable[..., Result], scored: Path, policy: Path, tmp_path: Path
) -> None:
    day = datetime.datetime.now(datetime.UTC).date() - datetime.timedelta(days=20)
    waiver = f'\n[[waiver]]\ngate = "kl"\nuntil = {(day + datetime.timedelta(days=2)).isoformat()}\nreason = "x"\n'
    policy.write_text(policy.read_text().replace("max = 0.5", "max = 1e-9") + waiver)
    backdated = gate(scored, policy=policy, today=day)
    assert backdated.exit_code == 0
    write_verdict(backdated, tmp_path / "backdated.json")
    for words in ((), (scored, "--policy", policy)):
        result = run(*words, "--check", "backdated.json")
        assert result.code == 1
        assert "its waiver has expired" in result.out


def test_a_step_summary_is_written_where_the_ci_asks_for_one(
    run: Callable[..., Result], scored: Path, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "output"))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    result = run(scored, "--policy", policy, "--json")
    assert result.code == 0
    assert json.loads(result.out)["verdict"] == "PASS"
    assert "::notice" in result.err
    assert "PASS" in (tmp_path / "summary.md").read_text()
    assert "verdict=PASS" in (tmp_path / "output").read_text().splitlines()


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_a_signed_verdict_says_who_signed(
    run: Callable[..., Result], scored: Path, policy: Path, tmp_path: Path
) -> None:
    for name in ("key", "other"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(command, check=True, capture_output=True)
    signer = (tmp_path / "key.pub").read_text()
    (tmp_path / "allowed").write_text(f"release@example.org {signer}")
    (tmp_path / "others").write_text(f"other@example.org {(tmp_path / 'other.pub').read_text()}")
    assert run(scored, "--policy", policy, "--output", "v.json", "--sign", "key").code == 0
    signed = run("--check", "v.json", "--allowed-signers", "allowed")
    assert signed.code == 0
    assert "signed by release@example.org" in signed.err
    assert run("--check", "v.json", "--allowed-signers", "others").code == 5
    assert run("--check", "v.json", "--allowed-signers", "missing").code == 2
    assert run(scored, "--policy", policy, "--output", "w.json").code == 0
    assert "is not signed" in run("--check", "w.json", "--allowed-signers", "allowed").err
    shutil.copy(tmp_path / "v.json.sig", tmp_path / "w.json.sig")  # the signature of another file
    (tmp_path / "w.json").write_bytes((tmp_path / "w.json").read_bytes() + b"\n")
    assert run("--check", "w.json", "--allowed-signers", "allowed").code == 5


def test_the_noise_floor_is_kept_and_reported(
    run: Callable[..., Result], tiny: Path, policy: Path, tmp_path: Path
) -> None:
    policy.write_text(policy.read_text().replace("6000", "2600"))
    measured = run("--noise-floor", "--baseline", tiny, "--policy", policy, "--json")
    assert measured.code == 0
    noise = json.loads(measured.out)
    assert noise["kind"] == "compress.noise"
    assert list((tmp_path / "cache" / "noise").iterdir())
    verdict = json.loads(run(tiny, "--baseline", tiny, "--policy", policy, "--json").out)
    assert verdict["noise"] == noise
    assert verdict["gates"][0]["estimate"] == 0.0
    largest = max(abs(noise["values"]["ppl_ratio"][end]) for end in ("low", "high"))
    said = f"ppl_ratio {largest:.2g}"
    result = run(tiny, "--baseline", tiny, "--policy", policy, "--markdown", "v.md", "--junit", "v.xml")
    assert result.code == 0
    for shown in (result.err, *((tmp_path / name).read_text().replace("\\", "") for name in ("v.md", "v.xml"))):
        assert said in " ".join(shown.split())


def test_a_model_against_itself_says_that_no_floor_was_measured(
    run: Callable[..., Result], tiny: Path, damaged: Path, policy: Path, tmp_path: Path
) -> None:
    policy.write_text(policy.read_text().replace("6000", "2600"))
    result = run(tiny, "--baseline", tiny, "--policy", policy, "--markdown", "v.md", "--output", "v.json")
    assert result.code == 0
    assert json.loads((tmp_path / "v.json").read_text())["noise"] is None
    for shown in (result.err, (tmp_path / "v.md").read_text().replace("\\", "")):
        assert "noise floor: not measured; `compress gate --noise-floor" in " ".join(shown.split())
    other = run(damaged, "--baseline", tiny, "--policy", policy, "--markdown", "v.md")
    assert "noise floor" not in other.err
    assert "not measured" in (tmp_path / "v.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "missing argument 'CANDIDATE'"),
        (("--noise-floor",), "none is given"),
        (("x", "--baseline", "a", "--baseline", "b"), "two baselines are called 'baseline'"),
        (("x", "--baseline", "a=", "--baseline", "b"), "there is no path"),
        (("x", "--baseline", "a=1", "--baseline", "a=2"), "two baselines are called 'a'"),
        (("x", "--sign", "key"), "none is written"),
        (("x", "--allowed-signers", "f"), "belongs to --check"),
        (("x", "--plan", "--noise-floor"), "exclude each other"),
        (("x", "--output", "no/such/dir/v.json"), "there is no directory"),
        (("x", "--junit", "."), "is a directory"),
        (("--plan", "--policy", "missing.toml"), "cannot read the policy"),
    ],
)
def test_mistakes_on_the_command_line(run: Callable[..., Result], words: tuple[str, ...], message: str) -> None:
    result = run(*words)
    assert result.code == 2
    assert message in result.err
    assert result.out == ""


def test_baselines_by_name(run: Callable[..., Result], tmp_path: Path) -> None:
    write_record(made(), tmp_path / "now.json")
    write_record(made(model=model("earlier", 500, "w4a16-g128"), texts=[made_text(kl=0.03, log_ratio=0.03)]),
                 tmp_path / "last.json")  # fmt: skip
    write_record(made(model=model("baseline"), baseline=None, texts=[made_text(alone=True)]), tmp_path / "root.json")
    (tmp_path / "p.toml").write_text(
        """version = 1
gate = [
  {id = "kl", kind = "kl_mean", max = 0.03},
  {id = "drift", kind = "kl_increase", max_increase = 0.05, baseline = "last"},
]
"""
    )
    given = ("--baseline", "root=root.json", "--baseline", "last=last.json")
    result = run("now.json", *given, "--policy", "p.toml", "--json")
    assert result.code == 0
    verdict = json.loads(result.out)
    assert [gate["baseline"] for gate in verdict["gates"]] == ["root", "last"]
    assert {name: each["name"] for name, each in verdict["baselines"].items()} == {
        "root": "baseline",
        "last": "earlier",
    }
    assert "'last'; given: baseline" in run("now.json", "--policy", "p.toml").err


def test_the_default_policy_is_planned(run: Callable[..., Result]) -> None:
    result = run("--plan", "--json")
    assert result.code == 0
    rows: list[dict[str, Any]] = json.loads(result.out)["gates"]
    assert {row["gate"] for row in rows} >= {"size", "kl", "perplexity", "top1", "tail"}
