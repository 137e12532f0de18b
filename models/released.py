"""Weights of the authors' released checkpoints: their names mapped to ours."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from metadata_manager import GTRConfig, Metadata
from models import checkpoint
from models.atfm import ATFM
from models.gtr import GTR, TrainedOn
from models.st_net import STNet

GTR_HEADS = {"mean_l": "mean", "log_cov_diag_l": "log_cov_diag", "cov_factor_l": "cov_factor"}
# (pattern in the authors' names, ours), applied in this order: to_out.1, their norm, comes before to_out.
ST_NET_PARTS = [
    (r"^init_conv\.", "stem."),
    (r"^time_mlp\.1\.", "time_mlp.0."),
    (r"^time_mlp\.3\.", "time_mlp.2."),
    (r"^(downs|ups)\.(\d)\.0\.", r"\1.\2.block1."),
    (r"^(downs|ups)\.(\d)\.1\.", r"\1.\2.block2."),
    (r"^(downs|ups)\.(\d)\.2\.", r"\1.\2.attention."),
    (r"^(downs|ups)\.(\d)\.3\.(?:1\.)?", r"\1.\2.resample.conv."),
    (r"^mid_block([12])\.", r"middle.block\1."),
    (r"^mid_attn\.", "middle.attention."),
    (r"^final_res_block\.", "final_block."),
    (r"\.fn\.norm\.", ".norm."),
    (r"\.fn\.fn\.to_out\.1\.", ".out_norm."),
    (r"\.fn\.fn\.to_out\.(?:0\.)?", ".to_out."),
    (r"\.fn\.fn\.to_qkv\.", ".to_qkv."),
    (r"\.mlp\.1\.", ".time."),
    (r"\.block([12])\.proj\.", r".conv\1."),
    (r"\.block([12])\.norm\.", r".norm\1."),
    (r"\.res_conv\.", ".shortcut."),
]


def load_released(module: GTR | STNet, state_dict: Mapping[str, Tensor]) -> None:
    """Fills a GTR (of the released layout: convs=3, pool="avg", up="bilinear") or an STNet, strictly.

    Raises ValueError, naming the first names and shapes that do not fit, or a name that comes twice. In that
    case the module stays as it was.
    """
    rename = _gtr_name if isinstance(module, GTR) else _st_net_name
    renamed: dict[str, Tensor] = {}
    for name, weight in state_dict.items():
        if rename(name) in renamed:
            raise ValueError(f"released weights hold {rename(name)} twice, the second time as {name}; "
                             "expected it once")
        renamed[rename(name)] = weight
    # Compared before anything is filled in: load_state_dict would fill what fits and then fail.
    expected = {name: weight.shape for name, weight in module.state_dict().items()}
    given = {name: weight.shape for name, weight in renamed.items()}
    wrong = [f"{name}: checkpoint {_shape(given, name)}, model {_shape(expected, name)}"
             for name in sorted(expected.keys() | given.keys()) if expected.get(name) != given.get(name)]
    if wrong:
        raise ValueError(f"released weights do not fit this {type(module).__name__} in {len(wrong)} places, "
                         f"e.g. {'; '.join(wrong[:3])}; build it with the layout that the checkpoint was "
                         "trained with")
    module.load_state_dict(renamed)


def released_gtr(path: Path, config: GTRConfig, metadata: Metadata) -> GTR:
    """A GTR of a config's layout with the weights of a file of the authors."""
    # The file does not say what it was trained on: no image can be refused as one of them.
    gtr = GTR.of(config, metadata.channels)
    load_released(gtr, checkpoint.state_dict(path))
    gtr.trained_on = TrainedOn(metadata.side, metadata.channels, preset="released", path=path)
    return gtr.eval()


def released_flow(path: Path, atfm: ATFM, metadata: Metadata) -> ATFM:
    """A flow with the weights of a file of the authors."""
    load_released(atfm.net, checkpoint.state_dict(path))
    atfm.trained_on = TrainedOn(metadata.side, metadata.channels, preset="released", path=path)
    return atfm.eval()


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return str(tuple(shapes[name])) if name in shapes else "missing"


def _gtr_name(name: str) -> str:
    head, _, parameter = name.partition(".")
    if head in GTR_HEADS:
        return f"{GTR_HEADS[head]}.{parameter}"
    match = re.fullmatch(
        r"unet\.(contracting_path|upsampling_path)\.(\d+)\.(?:conv_block\.)?layers\.(\d+)\.(\w+)", name)
    if not match:
        return name
    path, level, layer, parameter = match.groups()
    blocks = "down_blocks" if path == "contracting_path" else "up_blocks"
    # The authors' list starts with a layer without weights; on the way down below the first level, pooling
    # comes before that.
    first = 2 if path == "contracting_path" and level != "0" else 1
    return f"unet.{blocks}.{level}.{int(layer) - first}.{parameter}"


def _st_net_name(name: str) -> str:
    for pattern, ours in ST_NET_PARTS:
        # No break: several patterns change parts of the same name.
        name = re.sub(pattern, ours, name)
    return name
