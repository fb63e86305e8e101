"""A SentencePiece model as a tokenizer.json of Hugging Face, which has no normaliser of SentencePiece but its parts.

Source: Kudo & Richardson 2018; what is done in which order follows sentencepiece's normalizer.cc, unigram_model.cc and
bpe_model.cc. Not every model has such a form (models of words, blanks as suffixes): who uses one compares ids.
"""

from __future__ import annotations

from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

_UNIGRAM = 1
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # types of pieces
_NEVER = 1e6  # below any score of a text: a piece that text must not become is this much less likely


def definition_of_sentencepiece(model: bytes) -> tuple[str, dict[str, str]]:
    """The text of a tokenizer.json, and the names of its special tokens for tokenizer_config.json."""
    proto: Any = sentencepiece_model_pb2.ModelProto.FromString(model)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = Tokenizer(_unigram(proto) if proto.trainer_spec.model_type == _UNIGRAM else _bpe(proto))
    spec = proto.normalizer_spec
    tokenizer.normalizer = _normalizer(spec)
    leads = spec.add_dummy_prefix or spec.remove_extra_whitespaces  # a blank at the start is left out again
    strip = [decoders.Strip(" ", 1, 0)] if leads else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = [p.piece for p in proto.pieces if p.type == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    if proto.trainer_spec.model_type != _UNIGRAM:
        fixed = [p.piece for p in proto.pieces if p.type == _USER_DEFINED]
        tokenizer.add_tokens([AddedToken(name, normalized=False) for name in fixed])
    return tokenizer.to_str(), _names(proto)


def _names(proto: Any) -> dict[str, str]:
    spec = proto.trainer_spec
    ids = {"unk_token": spec.unk_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id, "pad_token": spec.pad_id}
    return {name: proto.pieces[i].piece for name, i in ids.items() if i >= 0}


def _unigram(proto: Any) -> models.Unigram:
    """Pieces that no text becomes are there, as ids follow from places, and so unlikely that none does."""
    normal = [p.score for p in proto.pieces if p.type == _NORMAL]
    low, high = min(normal, default=0.0), max(normal, default=0.0)
    scores = {_NORMAL: lambda p: p.score, _USER_DEFINED: lambda p: len(p.piece.encode()) * high - 0.1}
    vocab = [(p.piece, scores.get(p.type, lambda _: low - _NEVER)(p)) for p in proto.pieces]
    return models.Unigram(vocab, unk_id=proto.trainer_spec.unk_id, byte_fallback=proto.trainer_spec.byte_fallback)


def _bpe(proto: Any) -> models.BPE:
    """Two pieces merge where what they make is a piece, the one of the best score first. Characters: merge nothing."""
    ids = {p.piece: i for i, p in enumerate(proto.pieces)}
    score = {p.piece: p.score for p in proto.pieces if p.type == _NORMAL}
    merges = [
        (whole[:cut], whole[cut:])
        for whole in sorted(score, key=lambda piece: -score[piece])
        for cut in range(1, len(whole))
        if whole[:cut] in score and whole[cut:] in score
    ]
    spec = proto.trainer_spec
    unknown = proto.pieces[spec.unk_id].piece
    return models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=spec.byte_fallback)


def _normalizer(spec: Any) -> normalizers.Sequence:
    steps: list[normalizers.Normalizer] = []
    if spec.name.startswith("nmt_"):
        # Each is a blank; what follows looks a pair up as one character, and would leave one blank of two.
        steps.append(normalizers.Replace("\r\n", "\n\r"))
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", "▁"))
    return normalizers.Sequence(steps)
