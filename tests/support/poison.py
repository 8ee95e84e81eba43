"""A model folder whose own code ends the process when a certain token comes by."""

import json
from pathlib import Path

from tests.support.models import make_encoder

CODE = """
import os
from transformers import BertModel
from transformers.models.bert.configuration_bert import BertConfig


class PoisonConfig(BertConfig):
    model_type = "poison"


class PoisonModel(BertModel):
    config_class = PoisonConfig

    def forward(self, input_ids=None, **kwargs):
        if (input_ids == {token_id}).any():
            os._exit(9)
        return super().forward(input_ids=input_ids, **kwargs)
"""


def make_poisonous(folder: Path, word: str) -> Path:
    """Write a model that needs trust_remote_code and dies of the first token of ``word``."""
    from transformers import AutoTokenizer

    make_encoder(folder)
    token_id = AutoTokenizer.from_pretrained(folder)(word, add_special_tokens=False)["input_ids"][0]
    (folder / "poison.py").write_text(CODE.format(token_id=token_id))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "poison",
        "auto_map": {"AutoConfig": "poison.PoisonConfig", "AutoModel": "poison.PoisonModel"},
        "architectures": ["PoisonModel"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
