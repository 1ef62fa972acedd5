"""What a config says about positions."""

import pytest
import transformers

from flr.model.backbone import position_limit
from tests.helpers.models import FAMILIES, tiny_config


@pytest.mark.parametrize("family", FAMILIES)
def test_position_limit_of_families(family):
    assert position_limit(tiny_config(family, max_position_embeddings=77)) == 77


def test_position_limit_of_others():
    assert position_limit(transformers.MptConfig(max_seq_len=9)) == 9
    assert position_limit(transformers.OPTConfig(max_position_embeddings=11)) == 11
    assert position_limit(transformers.CTRLConfig(n_positions=12)) == 12
    assert position_limit(transformers.BloomConfig()) is None
    assert position_limit(transformers.MambaConfig()) is None
    whole = transformers.Gemma3Config(text_config={"max_position_embeddings": 13})
    assert position_limit(whole) == 13  # of the part that reads text
