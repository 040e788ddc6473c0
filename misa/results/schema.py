"""What a result file says: one frozen description per run, checked when it is written and when it is read."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1

CURVE_COLUMNS = ("step", "tokens", "time_s", "metric", "value")

Kind = Literal["finetune", "pretrain", "evaluate", "memory", "variance", "rate"]


class _Strict(BaseModel):
    # A divergent run has a loss of NaN or infinity, and its result file must still be written and read back.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Machine(_Strict):
    """The machine a run used.

    Attributes:
        processor: Name of the processor as the system gives it.
        num_cores: Cores this process may use.
        memory_bytes: Main memory of the machine, bytes.
        gpu: Name of the accelerator in use, or None.
        num_threads: Threads torch computes with.
    """

    processor: str
    num_cores: int = Field(ge=1)
    memory_bytes: int = Field(ge=0)
    gpu: str | None = None
    num_threads: int = Field(ge=1)


class Provenance(_Strict):
    """Where a result comes from: command, code, versions, machine and data.

    Attributes:
        created: Time of writing, ISO 8601 with zone.
        command: The command line as a list of words.
        misa_version: Version of this package.
        package_digest: SHA-256 over the package's Python files (see `misa.results.package_digest`).
        commit: Commit of the checkout the package runs from, or "" outside one.
        dirty: Whether tracked files of the package differ from that commit.
        versions: Versions of Python and of the libraries that can change a result.
        machine: The machine.
        data_digest: SHA-256 over the data files read, or "" if there are none.
    """

    created: str
    command: list[str]
    misa_version: str
    package_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    commit: str = Field(default="", pattern=r"^([0-9a-f]{40,64})?$")
    dirty: bool = False
    versions: dict[str, str]
    machine: Machine
    data_digest: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")


class Result(_Strict):
    """Everything that one run has to say, the content of `result.json`.

    Attributes:
        schema_version: Version of this format, 1.
        run: Name of the run, unique inside one study.
        kind: What was done: finetune, pretrain, evaluate, memory, variance or rate.
        method: Name of the training method, a key of `misa.methods.METHODS`, or "none" for an untrained model.
        model: Name of the model or of the model size.
        data: Name of the data set.
        seed: The seed of the run.
        config: Every setting of the run, resolved.
        provenance: Where the numbers come from.
        metrics: What was measured about quality, such as train_loss, eval_loss, perplexity.
        peaks: Largest sizes seen, such as rss_bytes, state_bytes.
        timings: Times and speeds, such as train_s, step_s, tokens_per_s.
        curves: Name of the CSV file beside the result with columns `CURVE_COLUMNS`, or None.
    """

    schema_version: Literal[1] = 1
    run: str = Field(min_length=1)
    kind: Kind
    method: str = Field(min_length=1)
    model: str
    data: str
    seed: int = Field(ge=0)
    config: dict[str, Any]
    provenance: Provenance
    metrics: dict[str, float] = {}
    peaks: dict[str, float] = {}
    timings: dict[str, float] = {}
    curves: str | None = None


class CurvePoint(_Strict):
    """One row of `curves.csv`.

    Attributes:
        step: Optimizer steps done.
        tokens: Tokens trained on so far, padding not counted.
        time_s: Seconds spent in training steps so far; evaluation and saving are left out.
        metric: What the value is: train_loss, eval_loss, learning_rate, grad_norm or active_numel.
        value: The value.
    """

    step: int = Field(ge=0)
    tokens: int = Field(ge=0)
    time_s: float = Field(ge=0)
    metric: str = Field(min_length=1)
    value: float
