"""`compress generate`: text from a model or an artifact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from compress.commands import _environment
from compress.commands._command import command
from compress.commands._options import GENERAL, MEASURE, MODEL_OR_ARTIFACT_HELP, Machine
from compress.commands._output import View, number

if TYPE_CHECKING:
    from compress.runtime.protocol import Generation, Runtime, SamplingParams

SAMPLING = "Sampling"
DRAFT = "Speculative decoding"


@dataclass(frozen=True, kw_only=True)
class Generate(Machine):
    """Options of `compress generate`."""

    model: Annotated[
        str | None, typer.Argument(help=MODEL_OR_ARTIFACT_HELP, metavar="MODEL_OR_ARTIFACT", show_default=False)
    ] = None
    prompt: Annotated[
        str, typer.Option(help="Text to continue.", metavar="TEXT", rich_help_panel=SAMPLING, show_default=False)
    ]
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.", rich_help_panel=SAMPLING)] = 128
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest.", rich_help_panel=SAMPLING)] = 0.0
    top_k: Annotated[int, typer.Option(help="Only the k likeliest; 0 is off.", rich_help_panel=SAMPLING)] = 0
    top_p: Annotated[
        float, typer.Option(help="Only the likeliest that hold this probability; 1 is off.", rich_help_panel=SAMPLING)
    ] = 1.0
    min_p: Annotated[
        float,
        typer.Option(help="Only tokens of this share of the likeliest one's; 0 is off.", rich_help_panel=SAMPLING),
    ] = 0.0
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 makes tokens that were there less likely.", rich_help_panel=SAMPLING)
    ] = 1.0
    presence_penalty: Annotated[
        float, typer.Option(help="Above 0 makes tokens of the answer less likely.", rich_help_panel=SAMPLING)
    ] = 0.0
    frequency_penalty: Annotated[
        float, typer.Option(help="The same for each time that a token is there.", rich_help_panel=SAMPLING)
    ] = 0.0
    n: Annotated[int, typer.Option("--n", help="Answers.", metavar="N", rich_help_panel=SAMPLING)] = 1
    logprobs: Annotated[
        int | None,
        typer.Option(
            help="With --json, the log-probability of each token and of the K likeliest.",
            metavar="K",
            rich_help_panel=SAMPLING,
            show_default=False,
        ),
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End where this text comes. Several times.", metavar="TEXT", rich_help_panel=SAMPLING),
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", rich_help_panel=SAMPLING)] = 0
    draft: Annotated[
        str | None,
        typer.Option(
            help="Model or artifact that proposes tokens to MODEL; what comes out stays the same.",
            metavar="DIR",
            rich_help_panel=DRAFT,
            show_default=False,
        ),
    ] = None
    draft_tokens: Annotated[
        int, typer.Option(help="Tokens that it proposes at a time.", metavar="N", rich_help_panel=DRAFT)
    ] = 4
    kernel: Annotated[
        str, typer.Option(help="auto, cpu, cpu-int8, triton or reference.", metavar="NAME", rich_help_panel=GENERAL)
    ] = "auto"
    kv_cache: Annotated[
        str,
        typer.Option(
            help="How keys and values are kept: auto, float32, bfloat16, fp8, int8, nvfp4, int4 or int2.",
            metavar="NAME",
            rich_help_panel=GENERAL,
        ),
    ] = "auto"
    kv_skip: Annotated[
        str,
        typer.Option(
            help="Layers that keep them in bfloat16 instead: none, numbers with commas, or auto, as measured.",
            metavar="LIST",
            rich_help_panel=GENERAL,
        ),
    ] = "none"
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="No bit of an answer depends on what else is computed: the engine on a CPU is so anyway, on a GPU it "
            "costs time.",
            rich_help_panel=GENERAL,
        ),
    ] = False


@command("generate", Generate, panel=MEASURE)
def generate(options: Generate, view: View) -> None:
    """Continue a prompt with a model or an artifact. The text goes to stdout, how fast it came to stderr.

    Examples:

      $ compress generate --prompt "Once upon a time"
      $ compress generate ./artifact --prompt "The king" --max-tokens 60
      $ compress generate ./artifact --prompt "Hello" --temperature 0.8 --seed 7
      $ compress generate --prompt "Hello" --temperature 1 --n 3 --logprobs 5 --json
      $ compress generate ./artifact --prompt "Hello" --draft ./small
    """
    from compress.runtime.protocol import SamplingParams

    sampling = SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        n=options.n,
        logprobs=options.logprobs,
        stop=tuple(options.stop or ()),
        seed=options.seed,
    )
    _environment.prepare(options.threads)
    _environment.import_models()
    from compress.workflows import api

    runtime = api.load(
        options.model,
        device=options.device,
        kernel=options.kernel,
        kv_cache=options.kv_cache,
        kv_skip=options.kv_skip,
        deterministic=options.deterministic,
    )
    answers = _answered(options, runtime, sampling)
    answer = answers[0]
    decoded = max(len(answer.token_ids) - 1, 0)
    speed = decoded / answer.decode_seconds if decoded and answer.decode_seconds > 0 else None
    document = {
        "model": runtime.path,
        "prompt": options.prompt,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": len(answer.token_ids),
        "prefill_seconds": answer.prefill_seconds,
        "decode_seconds": answer.decode_seconds,
        "decode_tokens_per_second": speed,
        "runtime": runtime.name,
        "kernel": runtime.kernel,
        "device": runtime.device,
        "dtype": runtime.dtype,
        "speculation": answer.speculation,
        "kl_of_rounded_inputs": getattr(runtime, "rounding_loss", None),
        "kv_cache": _cache(runtime),
        "answers": [_answer(each) for each in answers],
    }
    view.result(document, [each.text for each in answers])
    view.note(
        f"{len(answer.token_ids)} tokens, {number(speed, 3)} per second after the first;"
        f" {runtime.name}, {runtime.kernel} {runtime.dtype} on {runtime.device}; stopped by {answer.finish_reason}"
    )
    if (drafted := answer.speculation) is not None:
        view.note(
            f"draft {options.draft}: {drafted.accepted} of {drafted.proposed} proposed tokens accepted,"
            f" {number(drafted.tokens_per_step, 3)} tokens per step of the model"
        )


def _answer(answer: Generation) -> dict[str, object]:
    """What --json says of each answer. logprobs: None where they were not asked for."""
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "cached_tokens": answer.cached_tokens,
        "logprobs": answer.logprobs,
    }


def _cache(runtime: Runtime) -> dict[str, object] | None:
    """What an engine keeps of each token, and what was measured of it; None elsewhere."""
    from compress.runtime.paged_backend import PagedRuntime

    if not isinstance(runtime, PagedRuntime):
        return None
    choice = runtime.cache
    return {
        "kind": choice.kind,
        "skipped": choice.skipped,
        "bytes_per_token": runtime.model.cache_bytes,
        "bytes_of_an_open_page": runtime.model.open_page_bytes,
        "kl": choice.kl,
        "kl_without_skipping": choice.kl_of_all,
    }


def _answered(options: Generate, runtime: Runtime, sampling: SamplingParams) -> list[Generation]:
    """The answer of the model, with its draft where one is given."""
    if options.draft is None:
        return runtime.generate([options.prompt], sampling)
    from compress.runtime.drafting.speculate import Speculator
    from compress.runtime.text_model import TextModel
    from compress.workflows.drafts import open_draft

    assert isinstance(runtime, TextModel)
    draft = open_draft(options.draft, runtime, device=options.device, kernel=options.kernel)
    return Speculator(runtime, draft, options.draft_tokens).generate([options.prompt], sampling)
