"""The authors' command lines run as published, but for model, data and length; and their flags mean what they meant."""

from __future__ import annotations

import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from misa import evaluate, pretrain, train
from misa.results import read_result
from misa.training.published import translate_pretrain, translate_train

FINETUNE = """
    --model_name_or_path meta-llama/Llama-2-7b-hf \
    --dataset_path vicgalle/alpaca-gpt4\
    --task_name alpaca \
    --do_train True \
    --do_eval True\
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --eval_on_start True \
    --granularity module \
    --optim adamw_hf\
    --use_bcd True \
    --bcd_update_order misa \
    --param_ratio_limit 0.03 \
    --sample_last 2 \
    --misa_eta 1.0 \
    --validation_samples 500 \
    --bcd_interval_steps 50 \
    --eval_steps 200 \
    --seed 42 \
    --num_train_epochs 3 \
    --learning_rate 5e-5 \
    --lr_scheduler_type cosine\
    --max_seq_length 512 \
    --logging_steps 1 \
    --save_total_limit 0 \
    --eval_strategy steps \
    --save_strategy no \
    --overwrite_output_dir \
    --output_dir result/alpaca/misa/  \
    --report_to wandb """

PRETRAIN = """
    --model_config c4_pretraining/configs/$MODEL.json \
    --single_gpu \
    --max_length 256 \
    --dtype bfloat16 \
    --num_training_steps 55000 \
    --warmup_steps 5500 \
    --eval_every 1500 \
    --save_every 10000 \
    --total_batch_size 256 \
    --batch_size 32 \
    --save_dir c4_pretraining/results/MISA/$MISA_ETA/$BCD_ORDER/$BCD_RATIO \
    --seed $SEED \
    --optimizer bcd-optimizer \
    --lr $LEARNING_RATE \
    --beta1 0.9 \
    --beta2 0.999 \
    --eps 1e-8 \
    --weight_decay 0.0 \
    --grad_clipping 0.0 \
    --bcd_activated_layers 1\
    --bcd_interval_steps $BCD_INTERVAL\
    --bcd_update_order $BCD_ORDER\
    --granularity module\
    --param_ratio_limit $BCD_RATIO\
    --misa_eta $MISA_ETA\
    --include_embedding_and_lm_head \
    --wandb_project Pretrain_C4_${MODEL} \
    --wandb_run_name MISA[${BCD_RATIO}]_${SEED}_LR${LEARNING_RATE}_\
Interval${BCD_INTERVAL}_ETA${MISA_ETA}_Order[${BCD_ORDER}]"""

VARIABLES = {
    **{"SEED": "1234", "MODEL": "llama_350m", "LEARNING_RATE": "1e-3", "BCD_INTERVAL": "50"},
    **{"MISA_ETA": "500", "BCD_ORDER": "misa", "BCD_RATIO": "0.25"},
}

EVALUATE = """
    --model_name_or_path meta-llama/Llama-2-7b-hf \
    --task_name {task} \
    --max_seq_length 512 \
    --load_type bf16 \
    --output_dir result/alpaca/misa/  \
    --report_to wandb """


def changed(line: str, **flags: Any) -> list[str]:
    """Words of a line with other values; None takes a flag out, True leaves it without a value."""
    groups: dict[str, list[str]] = {}
    for word in shlex.split(line):
        if word.startswith("--"):
            groups[word] = []
        else:
            groups[list(groups)[-1]].append(word)
    for name, value in flags.items():
        if value is None:
            del groups[f"--{name}"]
        else:
            groups[f"--{name}"] = [] if value is True else [str(value)]
    return [word for name, values in groups.items() for word in (name, *values)]


# The README's line and what the authors' scripts change in it.
LAYERS = {"granularity": "layer", "bcd_update_order": "ascending", "bcd_activated_layers": "1"}
NO_BUDGET = {"param_ratio_limit": None, "sample_last": None, "misa_eta": None}
FINETUNING = {
    "readme": (
        {},
        "misa_official",
        {"granularity": "matrix", "budget": 0.2, "sample_last": 2, "eta": 1.0, "clip": 5.0},
    ),
    "math": (
        {"dataset_path": "datasets/Math10k", "task_name": "math", "gradient_accumulation_steps": "4"},
        "misa_official",
        {"interval": 50},
    ),
    "badam": ({**LAYERS, **NO_BUDGET}, "badam_official", {"order": "ascending", "num_blocks": 1, "always_on": []}),
    "lisa": (
        {**LAYERS, **NO_BUDGET, "include_embedding_and_lm_head": "True"},
        "lisa_official",
        {"order": "ascending", "num_blocks": 1, "always_on": ["embeddings", "head"]},
    ),
}


@pytest.mark.parametrize("name", FINETUNING)
def test_finetuning_line_runs_as_published(
    small: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    flags, method, settings = FINETUNING[name]
    # Model, data and length; of a model of 50,000 parameters no matrix fits into 3%.
    here: dict[str, Any] = {"model_name_or_path": small / "model", "dataset_path": small / "instructions"}
    here |= {"validation_samples": 4, "output_dir": tmp_path / name, "num_train_epochs": 1}
    if "param_ratio_limit" not in flags:
        here["param_ratio_limit"] = 0.2
    with caplog.at_level(logging.INFO, logger="misa"):
        assert train.main(changed(FINETUNE, **{**flags, **here})) == 0
    assert "published flags: --optim adamw_hf --use_bcd True" in caplog.text
    assert f"--method {method}" in caplog.text
    result = read_result(tmp_path / name)
    assert result.method == method
    assert result.seed == 42
    assert result.config["max_length"] == 512
    for key, value in settings.items():
        assert result.config["method_settings"][key] == value, key
    assert result.config["gradient_accumulation_steps"] == int(flags.get("gradient_accumulation_steps", 8))
    assert result.metrics["num_steps"] == -(-20 // (2 * result.config["gradient_accumulation_steps"]))


BASELINES = {
    "adamw": ({"optimizer": "adamw", "grad_clipping": "1.0"}, "adamw_bf16"),
    "galore": ({"optimizer": "galore", "galore_rank": "32"}, "galore"),
    "galore-layerwise": (
        {"optimizer": "galore-layerwise", "galore_rank": "32", "batch_size": "256"},
        "galore_layerwise",
    ),
}
BLOCK_FLAGS = (
    *("bcd_activated_layers", "bcd_interval_steps", "bcd_update_order", "granularity", "param_ratio_limit"),
    *("misa_eta", "include_embedding_and_lm_head"),
)


def pretraining_here(small: Path) -> dict[str, Any]:
    """Model, data and length."""
    sizes = {"num_training_steps": 2, "warmup_steps": 1, "max_length": 32}
    return {"model_config": small / "tiny.json", "dataset_path": small / "corpus", **sizes}


@pytest.mark.parametrize("name", BASELINES)
def test_pretraining_baseline_runs_as_published(small: Path, tmp_path: Path, name: str) -> None:
    flags, method = BASELINES[name]
    line = PRETRAIN
    for variable, value in VARIABLES.items():
        line = line.replace(f"${variable}", value).replace(f"${{{variable}}}", value)
    without = dict.fromkeys(BLOCK_FLAGS)
    here = {**pretraining_here(small), "save_dir": tmp_path / name}
    assert pretrain.main(changed(line, **{**flags, **without, **here})) == 0
    result = read_result(tmp_path / name)
    assert result.method == method
    assert result.config["max_grad_norm"] == float(flags.get("grad_clipping", 0))
    assert result.config["lr_scheduler_type"] == "cosine_with_min_lr"
    assert result.config["seed"] == 1234
    assert result.config["dtype"] == "bfloat16"


@pytest.mark.slow
def test_pretraining_line_runs_as_published_under_torchrun(small: Path, tmp_path: Path) -> None:
    """With the shell's variables and torch's launcher; the path of the program is the module's."""
    exports = "\n".join(f"export {name}={value}" for name, value in VARIABLES.items())
    start = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=1 -m misa.pretrain"
    here = " ".join(f"--{name} {value}" for name, value in pretraining_here(small).items() if name == "dataset_path")
    line = PRETRAIN.replace("c4_pretraining/configs/$MODEL.json", str(small / "tiny.json"))
    for old, new in (("steps 55000", "steps 2"), ("steps 5500", "steps 1"), ("--max_length 256", "--max_length 32")):
        assert old in line
        line = line.replace(old, new)
    repository = Path(__file__).parents[2]
    done = subprocess.run(
        ["bash", "-c", f"{exports}\n{start} {line.strip()} {here}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = read_result(tmp_path / "c4_pretraining/results/MISA/500/misa/0.25")
    assert result.method == "misa_official"
    settings = result.config["method_settings"]
    assert (settings["budget"], settings["eta"], settings["interval"]) == (0.25, 500, 50)
    assert settings["always_on"] == ["embeddings", "head"]
    assert result.config["gradient_accumulation_steps"] == 8
    assert result.config["learning_rate"] == 1e-3


@pytest.mark.parametrize("task", ["math", "commonsense"])
def test_evaluation_line_is_understood(
    small: Path, tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a hub the line itself is right, and the message names what is missing and where it comes from."""
    here = changed(EVALUATE.format(task=task), model_name_or_path=small / "model", output_dir=tmp_path / "out")
    assert evaluate.main([*here, "--offline"]) == 2
    first = {"math": "misa_gsm8k", "commonsense": "misa_boolq"}[task]
    assert f"data_dir is not given: the data of {first} would come from" in capsys.readouterr().err


def options(words: list[str]) -> dict[str, str]:
    return dict(zip(words[::2], words[1::2], strict=True))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--use_bcd --bcd_update_order misa", {"method": "misa_official", "granularity": "layer", "num_blocks": "1"}),
        ("--use_bcd --bcd_update_order random --granularity module", {"method": "misa_uniform", "budget": "0.03"}),
        ("--use_bcd true --bcd_update_order descending", {"method": "badam_official", "order": "descending"}),
        ("--use_lora True --use_bcd True", {"method": "misa_lora", "lora_alpha": "16", "budget": "0.03"}),
        ("--mix_lora True --use_bcd True --lora_r 4", {"method": "misa_lora", "lora_r": "4"}),
        ("--use_lora True", {"method": "lora", "lora_r": "8", "lora_alpha": "16", "lora_dropout": "0.05"}),
        ("--use_lora True --use_dora True", {"method": "dora", "lora_r": "8"}),
        ("--use_galore True --galore_alpha 0.5", {"method": "galore", "galore_r": "16", "galore_alpha": "0.5"}),
        ("--use_bcd False --optim adamw_hf", {"method": "adamw"}),
        ("--optim sgd", {"method": "sgd"}),
        ("--optim sgd --method misa", {"method": "misa", "inner": "sgd"}),
        ("--evaluation_strategy steps --warmup_ratio 0.1", {"eval_strategy": "steps", "warmup_steps": "0.1"}),
        ("--load_type bf16 --max_seq_length 64", {"dtype": "bfloat16", "max_length": "64"}),
        ("--method misa --budget 0.03 --interval 50", {"method": "misa", "budget": "0.03", "interval": "50"}),
    ],
)
def test_finetuning_flags_mean_what_they_meant(line: str, expected: dict[str, str]) -> None:
    assert options(translate_train(shlex.split(line))).items() >= {f"--{k}": v for k, v in expected.items()}.items()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--batch_size 4 --total_batch_size 64", {"gradient_accumulation_steps": "16"}),
        ("--batch_size 4 --gradient_accumulation 2 --total_batch_size 8", {"gradient_accumulation_steps": "2"}),
        ("--max_train_tokens 1M --batch_size 8 --max_length 128", {"max_steps": "976"}),
        ("--max_train_tokens 1.1B --batch_size 512 --total_batch_size 512", {"max_steps": "8392"}),
        ("--scheduler cosine_restarts", {"lr_scheduler_type": "cosine_with_restarts"}),
        ("--min_lr_ratio 0.2", {"lr_scheduler_kwargs": '{"min_lr_rate":0.2}'}),
        ("--eval_every 7 --save_every 9", {"eval_strategy": "steps", "eval_steps": "7", "save_steps": "9"}),
        ("--wandb_project P --name N --workers 2", {"project": "P", "run_name": "N", "dataloader_num_workers": "2"}),
        (
            "--optimizer bcd-optimizer",
            {"method": "misa_official", "budget": "1.0", "max_steps": "10000", "warmup_steps": "1000", "seed": "0"}
            | {"learning_rate": "1e-4", "max_grad_norm": "0", "lr_scheduler_kwargs": '{"min_lr_rate":0.1}'},
        ),
        ("--optimizer adamw --dtype float32", {"method": "adamw"}),
        ("--optimizer galore", {"method": "galore", "galore_r": "256"}),
    ],
)
def test_pretraining_flags_mean_what_they_meant(line: str, expected: dict[str, str]) -> None:
    assert options(translate_pretrain(shlex.split(line))).items() >= {f"--{k}": v for k, v in expected.items()}.items()


@pytest.mark.parametrize(
    ("translate", "line", "message"),
    [
        (translate_train, "--use_lora True --use_galore True", "--use_lora True and --use_galore True contradict"),
        (translate_train, "--use_bcd True --use_dora True", "--use_bcd True and --use_dora True contradict"),
        (translate_train, "--use_bcd True --order random", "--order random goes with --method; with --use_bcd True"),
        (translate_train, "--use_bcd True --method lora", "--use_bcd True and --method lora contradict"),
        (translate_train, "--bcd_update_order misa", "--bcd_update_order needs --use_bcd True"),
        (translate_train, "--mix_lora True", "--mix_lora True needs --use_bcd True"),
        (translate_train, "--use_bcd True --bcd_update_order best", "--bcd_update_order is 'best': allowed is misa"),
        (translate_train, "--use_bcd maybe", "--use_bcd is 'maybe': allowed is True or False"),
        (translate_train, "--max_seq_length 3 --max_length 4", "--max_length 4 and --max_seq_length 3 contradict"),
        (translate_train, "--load_type int8", "--load_type is 'int8': allowed is fp16, bf16, fp32"),
        (translate_train, "--save_safetensors False", "allowed is True"),
        (translate_pretrain, "--batch_size 30 --total_batch_size 256", "--total_batch_size 256 is not a multiple of"),
        (
            translate_pretrain,
            "--batch_size 4 --gradient_accumulation 2 --total_batch_size 16",
            "--total_batch_size 16, --batch_size 4 and --gradient_accumulation 2 contradict",
        ),
        (translate_pretrain, "--max_train_tokens 1M --num_training_steps 5", "--max_train_tokens and --num_training"),
        (translate_pretrain, "--max_train_tokens 1T", "--max_train_tokens is '1T': allowed is a whole number"),
        (translate_pretrain, "--optimizer lion", "--optimizer is 'lion': allowed is adamw, bcd-optimizer"),
        (translate_pretrain, "--optimizer adamw --method misa", "contradict"),
        (translate_pretrain, "--optimizer adamw --misa_eta 2", "--misa_eta needs --optimizer bcd-optimizer"),
        (translate_pretrain, "--scheduler linear --min_lr_ratio 0.1", "--min_lr_ratio 0.1 and --scheduler linear"),
        (translate_pretrain, "--scheduler step", "--scheduler is 'step': allowed is linear, cosine"),
    ],
)
def test_contradictions_are_refused_by_both_names(translate: Any, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        translate(shlex.split(line))


def test_single_gpu_and_several_processes_contradict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--single_gpu and 2 processes contradict each other"):
        translate_pretrain(["--single_gpu"])
    words = translate_pretrain(["--batch_size", "4", "--total_batch_size", "16"])
    assert options(words)["--gradient_accumulation_steps"] == "2"


def test_precision_of_a_published_line_may_be_auto() -> None:
    words = translate_pretrain(["--optimizer", "adamw", "--dtype", "auto"])
    assert words[words.index("--method") + 1] in ("adamw", "adamw_bf16")
    with pytest.raises(ValueError, match="dtype is 'fp99'"):
        translate_pretrain(["--optimizer", "adamw", "--dtype", "fp99"])


def test_flags_of_blocks_that_are_switched_off_mean_nothing() -> None:
    line = ["--use_bcd", "False", "--bcd_update_order", "misa", "--granularity", "module", "--sample_last", "2"]
    words = translate_train(line)
    assert "--granularity" not in words
    assert "--sample_last" not in words
    assert words[words.index("--method") + 1] == "adamw"
