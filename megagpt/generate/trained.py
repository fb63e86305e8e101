"""A trained model by the name of its run or folder: for evaluation and generation, without an engine, in any layout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from megagpt.checkpoint.adapters import Adapters, base_of, lora_of, read_adapters, require_adapted
from megagpt.checkpoint.folders import find
from megagpt.checkpoint.load import find_whole, load_weights
from megagpt.checkpoint.state import read_state
from megagpt.checkpoint.strict import STRICT, Allowed
from megagpt.cli import read_config
from megagpt.config import DataConfig, ParallelConfig, RunConfig
from megagpt.data.tokenizers.kept import tokenizer_of_checkpoint
from megagpt.data.tokenizers.tokenizer import UNBOUND, Bounds, Tokenizer, tokenizer_of_run
from megagpt.errors import UserError
from megagpt.generate.stage import Stage, build_stage
from megagpt.hf.import_folder import read_folder
from megagpt.hf.peft_folder import is_adapter_folder, read_adapter_folder
from megagpt.hf.tokenizer_folder import bounds_of, find_tokenizer
from megagpt.inventory.layers import canonical
from megagpt.inventory.parameter import AVERAGE, WEIGHT
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.parameter import give_memory
from megagpt.plan.fit import check_model
from megagpt.processes.agree import together
from megagpt.processes.launched import n_processes
from megagpt.processes.start import distributed
from megagpt.processes.watch.limits import Limits
from megagpt.processes.watch.watch import Watch

Weights = Literal["last", "ema"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, or this process's stage of it, and where it came from.

    config: of the run; of a folder of transformers, the defaults around its model.  step: 0 for these.
    bounds: of texts, where transformers' files say so of a model that they brought and that was not trained since.
    """

    stage: Stage
    config: RunConfig
    tokenizer: Tokenizer | None
    folder: Path
    step: int
    bounds: Bounds = UNBOUND

    @property
    def mesh(self) -> Mesh:
        """The processes that share the model."""
        return self.stage.mesh

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.stage.weight.device


@dataclass(frozen=True)
class _Source:
    """Where a model comes from. tokenizer: with what is around its texts.  fill: reads the weights of a stage, to
    which what adapters add is added then.
    """

    config: RunConfig
    folder: Path
    step: int
    tokenizer: Callable[[], tuple[Tokenizer | None, Bounds]]
    fill: Callable[[Stage], None]
    adapters: Adapters | None = None


@contextmanager
def open_trained(
    path: str | Path,
    fallback: bool = False,
    weights: Weights = "last",
    allowed: Allowed = STRICT,
    tokenizer: DataConfig | None = None,
    *,
    pp: int = 1,
    dp: int = 1,
    precision: str = "fp32",
    adapter: str | Path | None = None,
) -> Iterator[Trained]:
    """`load_trained` on the processes that were started (torchrun, deepspeed), for as long as the block lasts.

    pp, dp: stages and replicas; the rest share each layer: tensor parallelism.
    Raises UserError where the processes cannot be laid out so.
    """
    with laid_out(pp=pp, dp=dp) as (mesh, _):
        yield load_trained(path, mesh, fallback, weights, allowed, tokenizer, precision=precision, adapter=adapter)


@contextmanager
def laid_out(*, pp: int, dp: int, limits: Limits | None = None) -> Iterator[tuple[Mesh, Watch]]:
    """`distributed`, with tensor parallelism over what stages and replicas leave of the processes that were started.

    Raises UserError where they cannot be laid out so.
    """
    n_ranks = n_processes()
    if n_ranks % (pp * dp):
        raise UserError(
            f"got {n_ranks} processes for --pp {pp} --dp {dp}", f"wanted a multiple of {pp * dp}", "start as many"
        )
    with distributed(pp=pp, dp=dp, tp=n_ranks // (pp * dp), limits=limits) as found:
        yield found


def load_trained(
    path: str | Path,
    mesh: Mesh,
    fallback: bool = False,
    weights: Weights = "last",
    allowed: Allowed = STRICT,
    tokenizer: DataConfig | None = None,
    *,
    precision: str = "fp32",
    adapter: str | Path | None = None,
) -> Trained:
    """Load the latest checkpoint of a run folder, another of its (RUN@best, RUN@STEP), a checkpoint folder, or a
    folder of transformers: a config.json and safetensors. No layout is asked of them: each rank reads its part.

    fallback: where it is damaged, take the newest whole one before it.  weights: the last ones, or their average.
    allowed: tensors that only one of checkpoint and model may have.  tokenizer: names it where the folder has none.
    precision: of weights, activations and cache: fp32 or bf16.  adapter: a run or checkpoint of adapters, or a folder
    of peft, merged into the weights in fp32; a path that means adapters is merged into the base that it names.
    Comm: collective over all ranks.  Raises a RankError where what is there is no such model.
    """
    say = partial(print, file=sys.stderr) if mesh.rank == 0 else lambda _: None
    if _is_transformers(Path(path)):
        source = _transformers(Path(path), allowed, tokenizer, say)
    else:
        source = _ours(path, fallback, weights, allowed, tokenizer, say)
    layout = ParallelConfig(tp=mesh.model.size, pp=mesh.pipe.size)
    together(lambda: check_model(replace(source.config, parallel=layout)))
    adapters = together(lambda: _adapters(adapter, source, weights)) if adapter is not None else source.adapters
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", DTYPES["fp32" if adapters else precision]
    if allowed.missing:  # what is missing has first weights
        stage = build_stage(source.config.model, mesh).to(device, dtype)
    else:
        stage = build_stage(source.config.model, mesh, empty=True)
        for named in stage.canonical_parameters():
            give_memory(named.parameter, device, dtype)
    together(lambda: source.fill(stage))
    if adapters is not None:
        together(lambda: adapters.merge_into(stage.canonical_parameters()))
        stage.to(dtype=DTYPES[precision])
    found, bounds = together(source.tokenizer)
    return Trained(stage, source.config, found, source.folder, source.step, bounds)


def _ours(
    path: str | Path,
    fallback: bool,
    weights: Weights,
    allowed: Allowed,
    tokenizer: DataConfig | None,
    say: Callable[[str], None],
) -> _Source:
    key = AVERAGE if weights == "ema" else WEIGHT
    folder = weights_in = find_whole(path, fallback, say, newest_will_do=fallback, keys=[key])
    state = read_state(folder)
    adapters = together(lambda: read_adapters(folder, key) if lora_of(state, folder) else None)
    if adapters is not None:
        base = together(lambda: base_of(folder))
        weights_in, key = find_whole(base, False, say, keys=[WEIGHT]), WEIGHT
    config = read_config(state.config, f"{folder}/state.json")
    sha256 = state.data.get("tokenizer_sha256")

    def found() -> tuple[Tokenizer | None, Bounds]:
        there = tokenizer_of_checkpoint(folder.parent.parent, config.data, sha256, tokenizer)
        imported = there is not None and there.files and not config.data.data_path.prefixes
        return there, bounds_of(there, there.files[0].parent) if there and imported else UNBOUND

    return _Source(
        config,
        folder,
        state.step,
        found,
        lambda stage: load_weights(
            stage.canonical_parameters(), weights_in, key, allowed, say, names=canonical(config.model)
        ),
        adapters,
    )


def _adapters(path: str | Path, source: _Source, weights: Weights) -> Adapters:
    """Those of --adapter, for a model that has none yet."""
    if source.adapters is not None:
        got = f"--adapter {path} with --load {source.folder}, which holds adapters itself"
        raise UserError(got, "are two for one base", "give --load the base, or leave out --adapter")
    if is_adapter_folder(Path(path)):
        _, found = read_adapter_folder(Path(path), source.config.model)
    else:
        found = read_adapters(find(path), AVERAGE if weights == "ema" else WEIGHT)
    require_adapted(found, source.config, path)
    return found


def _is_transformers(path: Path) -> bool:
    """Whether a folder is one of transformers, and not a run of ours."""
    return (path / "config.json").is_file()


def _transformers(path: Path, allowed: Allowed, tokenizer: DataConfig | None, say: Callable[[str], None]) -> _Source:
    model, lazy = together(lambda: read_folder(path, say, allow_unused=allowed.unused))

    def fill(stage: Stage) -> None:
        for named in stage.canonical_parameters():
            values = named.part.take(lazy[named.name].get())
            named.part.unpadded(named.parameter.data).copy_(values)

    def found() -> tuple[Tokenizer | None, Bounds]:
        there, note = (tokenizer_of_run(tokenizer), None) if tokenizer else find_tokenizer(path)
        if note:
            say(f"note: without a tokenizer: {note}")
        return there, bounds_of(there, path)

    return _Source(RunConfig(model=model), path, 0, found, fill)
