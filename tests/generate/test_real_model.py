"""A real pretrained model writes its published text: in each layout, and through a checkpoint of ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megagpt.generate import Sampling, complete
from megagpt.generate.trained import load_trained
from megagpt.hf.import_folder import import_model
from megagpt.parallel.mesh import build_mesh
from megagpt.processes.local import run_ranks

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "stories260K"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason=f"the model is not beside this checkout, in {FOLDER}")


def _write(load: Path, tp: int, pp: int, n_tokens: int) -> list[int]:
    """On a rank: the likeliest text."""
    stage = load_trained(load, build_mesh("cpu", pp=pp, dp=1, tp=tp)).stage
    ((text,),) = complete(stage, None, [[1]], Sampling(n_tokens=n_tokens, temperature=0))
    return [1, *text.tokens]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_it_writes_its_published_text(tp: int, pp: int, tmp_path: Path):
    published = json.loads((FOLDER / "greedy.json").read_text())["greedy_ids_from_bos"]
    load = FOLDER if pp == 1 else import_model(FOLDER, tmp_path / "run")
    assert run_ranks(_write, tp * pp, load, tp, pp, len(published) - 1) == [published] * (tp * pp)
