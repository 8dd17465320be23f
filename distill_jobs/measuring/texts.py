"""Answers against reference texts: BLEU, chrF (sacrebleu), ROUGE-1/2/L (rouge-score), exact match.

Knows nothing about who wrote either text. A request without a reference says nothing; an empty answer is a
wrong one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from distill_jobs.measuring.statistics import Statistic, mean_of

_WORD = re.compile(r"[぀-ヿ㐀-䶿一-鿿가-힯豈-﫿]|[^\W_]+", re.UNICODE)
"""A CJK character, or a run of letters and digits of any script."""
_ROUGE = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}


class Words:
    """A tokenizer for rouge-score; its own keeps ASCII only, so any two Chinese texts would be equal."""

    def tokenize(self, text: str) -> list[str]:
        """Lower-case words; each Chinese or Japanese character is one."""
        return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def against_references(
    answers: Sequence[str], references: Sequence[str | None], bleu_tokenize: str
) -> dict[str, Statistic]:
    """BLEU and chrF (0 to 100, over the corpus), ROUGE F1 (0 to 1, mean over requests), exact match."""
    known = [i for i, reference in enumerate(references) if reference is not None]
    if not known:
        return {}
    texts = [_nfc(answers[i]) for i in known]
    wanted = [_nfc(references[i] or "") for i in known]
    size = len(answers)
    found = {
        "bleu": Statistic(_spread(_bleu(texts, wanted, bleu_tokenize), known, size), "bleu"),
        "chrf": Statistic(_spread(_chrf(texts, wanted), known, size), "chrf"),
        "exact_match": mean_of(
            _at(known, size, [float(_same(t, w)) for t, w in zip(texts, wanted, strict=True)])
        ),
    }
    for name, scores in _rouge(texts, wanted).items():
        found[name] = mean_of(_at(known, size, scores))
    return found


def _bleu(texts: list[str], wanted: list[str], tokenize: str) -> np.ndarray:
    """[known, 2 + 2 * orders + 1] sums: lengths, matches, totals, and 1 for the request."""
    from sacrebleu.metrics import BLEU

    rows = BLEU(tokenize=tokenize, force=True)._extract_corpus_statistics(texts, [wanted])
    return np.array([[*row, 1] for row in rows], dtype=np.float64)


def _chrf(texts: list[str], wanted: list[str]) -> np.ndarray:
    from sacrebleu.metrics import CHRF

    rows = CHRF()._extract_corpus_statistics(texts, [wanted])
    return np.array([[*row, 1] for row in rows], dtype=np.float64)


def _rouge(texts: list[str], wanted: list[str]) -> dict[str, list[float | None]]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(_ROUGE), tokenizer=Words())
    found: dict[str, list[float | None]] = {name: [] for name in _ROUGE.values()}
    for text, reference in zip(texts, wanted, strict=True):
        equal = _same(text, reference)
        scores = {} if equal else scorer.score(reference, text)
        for theirs, name in _ROUGE.items():
            # Equal texts without a word (or with one, for bigrams) would get 0.
            found[name].append(1.0 if equal else scores[theirs].fmeasure)
    return found


def _same(text: str, reference: str) -> bool:
    return text.strip() == reference.strip()


def _nfc(text: str) -> str:
    """One spelling for equal characters: é may be one code point or two."""
    return unicodedata.normalize("NFC", text)


def _spread(rows: np.ndarray, at: list[int], size: int) -> np.ndarray:
    full = np.zeros((size, rows.shape[1]))
    full[at] = rows
    return full


def _at(at: list[int], size: int, values: Sequence[float | None]) -> list[float | None]:
    full: list[float | None] = [None] * size
    for index, value in zip(at, values, strict=True):
        full[index] = value
    return full
