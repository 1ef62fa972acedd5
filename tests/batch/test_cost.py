"""What everybody's lists cost, of models as they are saved."""

import json

from flr.batch.cost import Size
from flr.cli import main
from tests.helpers.serving import save


def test_a_saved_model_is_as_large_as_its_backbone(tmp_path, capsys):
    """flr writes the backbone's configuration under a name of its own; its trained weights are what is counted."""
    folder = save(tmp_path / "model", num_factors=3)
    config = json.loads((folder / "config.json").read_text())
    assert Size.of_config(config) == Size.of_config(config["base_config"])
    assert main(["plan", "--model", str(folder), "--users", "100", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["K"] == 3
    assert told["parameters"] == Size.of_config(config).parameters
