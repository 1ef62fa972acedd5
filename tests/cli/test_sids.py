"""Options of flr sids that mean nothing for what is to be done are refused by name, before any work."""

import pytest

from flr.cli import main
from flr.cli import sids as command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--embed cooccurrence --text_fields brand", "text_fields: expected none beside embed cooccurrence and method"),
        ("--embed tfidf --epochs 7", "epochs: expected none beside embed tfidf and method rq-kmeans, got 7"),
        ("--embed tfidf --latent_size 5", "latent_size: expected none beside embed tfidf and method rq-kmeans, got 5"),
        ("--embed tfidf --embed_max_tokens 3", "embed_max_tokens: expected none beside embed tfidf and method"),
        ("--embed tfidf --revision abc", "revision: expected none beside embed tfidf and method rq-kmeans, got 'abc'"),
        ("--embed tfidf --method rq-vae --iterations 3", "iterations: expected none beside embed tfidf and method rq-"),
        ("--embed some/model --embed_size 3", "embed_size: expected none beside embed a language model and method"),
        ("--embed e.npy --embed_size 3", "embed_size: expected none beside embed a .npy file and method rq-kmeans"),
        ("--codes_from i.json --levels 7", "levels: expected none beside codes_from, got 7"),
        ("--codes_from i.json --levels 3", "levels: expected none beside codes_from, got 3"),
        ("--codes_from i.json --seed 0", "seed: expected none beside codes_from, got 0"),
        ("--codes_from i.json --device cpu", "device: expected none beside codes_from, got 'cpu'"),
        ("--update true --levels 5", "levels: expected none beside update true and embed a language model, got 5"),
        ("--update true --text_fields brand", "text_fields: expected none beside update true and embed a language"),
        ("--update true --embed e.npy --balance 0", "balance: expected none beside update true and embed a .npy file"),
        ("--levels 5", "embed: expected a language model, tfidf, cooccurrence or FILE.npy, got none"),
    ],
)
def test_options_that_mean_nothing_are_refused(words, message, tmp_path, capsys):
    assert main(["sids", "--data", str(tmp_path), *words.split()]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"flr sids: {message}")


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("--embed tfidf --embed_size 8 --text_fields brand", {"size": 8, "fields": ["brand"]}),
        ("--embed m --embed_batch_size 2 --embed_max_tokens 9", {"batch_size": 2, "max_tokens": 9}),
        ("--embed e.npy --method rq-vae --epochs 2 --balance 0", {"method": "rq-vae", "epochs": 2, "balance": 0.0}),
        ("--update true --revision r --embed_batch_size 4", {"revision": "r", "batch_size": 4}),
    ],
)
def test_options_reach_what_makes_the_codes(words, given, monkeypatch, tmp_path):
    def called(*args, device, progress, overwrite, codebooks=None, source=None, **others):
        assert others == given
        return {}

    monkeypatch.setattr("flr.sids.update_codes" if "--update" in words else "flr.sids.make_codes", called)
    monkeypatch.setattr(command, "summary", str)
    assert main(["sids", "--data", str(tmp_path), *words.split()]) == 0
