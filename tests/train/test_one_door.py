"""Only megagpt/train/step/deepspeed knows DeepSpeed: nobody else imports it, or reads an attribute that is its own."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DOOR = "megagpt/train/step/deepspeed/"

# Attributes of DeepSpeed's engines, pipeline module, optimizers, loss scaler and parameters, and what it looks for.
THEIRS = re.compile(
    r"ds_\w+|_hp_mapping|[hl]p_fragment_address|grad_position|get_param_id|fp32_partitioned_groups_flat"
    r"|bit16_groups|bf16_groups|fp16_groups|fp32_groups_gradients|averaged_gradients|params_in_partition|cpu_offload"
    r"|check_grad_overflow|skipped_steps|micro_steps|loss_scaler|cur_scale|cur_iter|cur_hysteresis|last_overflow_iter"
    r"|(pipeline_)?enable_backward_allreduce|__compatible_ops__|reset_activation_shape|set_train_batch_size"
    r"|gradient_accumulation_steps|get_global_grad_norm|_global_grad_norm|overflow|train_batch|eval_batch"
    r"|get_tied_weights_and_groups|tied_weight_attrs|forward_funcs|_local_st(art|op)|model_parallel|_partition_layers"
)
OURS = {"state.skipped_steps", "at.skipped_steps"}  # of a checkpoint


def findings(root: Path) -> Iterator[str]:
    for top in ("megagpt", "tools", "examples", "benchmarks"):
        for file in sorted((root / top).rglob("*.py")):
            place = file.relative_to(root).as_posix()
            if not place.startswith(DOOR):
                yield from (f"{place}:{line}: {word}" for line, word in strange_words(file))


def strange_words(file: Path) -> Iterator[tuple[int, str]]:
    """(line, word) of each import of DeepSpeed, and of each attribute that is its own: read, set, or by name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Attribute) and THEIRS.fullmatch(node.attr) and ast.unparse(node) not in OURS:
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and len(node.args) > 0:
            function = getattr(node.func, "id", getattr(node.func, "attr", ""))
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if function in {"getattr", "setattr", "hasattr", "delattr"}:
                yield from ((node.lineno, text) for text in texts if THEIRS.fullmatch(text))
            elif function in {"import_module", "__import__"}:
                names = texts
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "deepspeed")


def test_nobody_else_knows_deepspeed():
    assert list(findings(REPOSITORY)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import deepspeed.comm",
        "from deepspeed import zero",
        "import importlib\nimportlib.import_module('deepspeed')",
        "x.ds_tensor.data",
        "engine.micro_steps = 0",
        "getattr(parameter, 'ds_id', None)",
        "p.model_parallel = True",
    ],
)
def test_a_second_door_is_found(tmp_path: Path, source: str):
    for place in ("megagpt/train/loop.py", DOOR + "zero.py"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(source + "\n")
    (found,) = findings(tmp_path)
    assert found.startswith("megagpt/train/loop.py:")
