"""lm_eval's `local-completions` asks the server, and scores texts as the engine does by itself."""

from __future__ import annotations

import pytest

from megagpt.data.tokenizers.bytes import ByteTokenizer
from megagpt.generate import Sampling, complete
from tests.serve.serving import opened, serving
from tests.serve.small_run import write_run

reason = "lm_eval is missing, which is heavy: pip install 'lm_eval[api]'"
pytest.importorskip("lm_eval", reason=reason)
pytest.importorskip("aiohttp", reason=reason)
PAIRS = [("def f(x):", " return x"), ("import", " os"), ("a", "é"), ("1 + 1 =", " 2\n"), ("x" * 40, "yz")]


@pytest.mark.timeout(300)
def test_scores_are_those_of_the_engine(tmp_path):
    # Heavy, and not always there.
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    def instances(kind: str, *arguments: tuple[object, ...]) -> list[Instance]:
        return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]

    encode = ByteTokenizer().encode
    with opened(write_run(tmp_path / "small")) as trained, serving(trained) as server:
        url = f"{server.address}/v1/completions"
        theirs = LocalCompletionsAPI(base_url=url, model="small", num_concurrent=4, max_length=64, max_retries=1)
        assert theirs.tokenizer_backend == "remote" and theirs.eot_token_id == 256
        scores = theirs.loglikelihood(instances("loglikelihood", *PAIRS))
        scored = Sampling(n_tokens=0, logprobs=1, prompt_logprobs=True)
        for (context, continuation), (score, is_greedy) in zip(PAIRS, scores, strict=True):
            ((text,),) = complete(trained.stage, trained.tokenizer, [context + continuation], scored)
            entries = text.prompt_logprobs[len(encode(context)) :]
            assert score == pytest.approx(sum(entry.logprob or 0 for entry in entries), abs=1e-4)
            assert is_greedy == all(entry.token == entry.likeliest[0][0] for entry in entries)
        written = theirs.generate_until(
            instances("generate_until", *((context, {"until": ["q"], "max_gen_toks": 9}) for context, _ in PAIRS))
        )
        greedy = Sampling(n_tokens=9, temperature=0, stop=("q",))
        assert written == [
            text.text
            for (text,) in complete(trained.stage, trained.tokenizer, [context for context, _ in PAIRS], greedy)
        ]
