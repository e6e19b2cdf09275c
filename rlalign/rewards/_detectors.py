"""Object detectors and instance segmentation models of transformers, by path: pictures to
detections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from rlalign.core.registry import UserError, read_reason
from rlalign.rewards._geneval_rules import Detection

Detect = Callable[[np.ndarray], list[dict[str, list[Detection]]]]
"""Pictures uint8 (N, 3, H, W) -> for each, class name -> detections in no order."""

_MOST = 100
"""Instances of a picture that a segmentation model gives, as mmdetection's does on COCO."""

_WITH_MASKS = ("mask2former", "maskformer")
"""Types of model that give a class and a mask per query."""

_ALIASES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "hair dryer": "hair drier",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "mouse": "computer mouse",
    "pottedplant": "potted plant",
    "remote": "tv remote",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""Names of COCO's classes in models -> in GenEval's prompts."""


def load_detector(path: str, place: str, device: str) -> tuple[Detect, list[str]]:
    """(a detector, the class names that it knows) of a model folder or hub id.

    Any model of transformers for object detection (DETR, RT-DETR, YOLOS ...), or Mask2Former and
    MaskFormer, which give masks too. Raises UserError naming ``place`` where it cannot be loaded.
    """
    from transformers import AutoImageProcessor
    from transformers.utils import logging as transformers_logging

    # it would tear the run's own
    transformers_logging.disable_progress_bar()
    model, has_masks = _model(path, place)
    try:
        processor = AutoImageProcessor.from_pretrained(path, local_files_only=Path(path).is_dir())
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{place}: cannot load {path!r}: {read_reason(error)}") from error
    model = model.to(device).eval().requires_grad_(False)
    names = {int(i): _class_name(name) for i, name in model.config.id2label.items()}

    @torch.no_grad()
    def detect(pictures_NCHW: np.ndarray) -> list[dict[str, list[Detection]]]:
        inputs = _inputs(processor, pictures_NCHW, device)
        outputs = model(**inputs)
        size = pictures_NCHW.shape[-2:]
        if has_masks:
            some = _instances(outputs, inputs, size)
        else:
            some = _boxes(processor, outputs, len(pictures_NCHW), size)
        return [_by_class(each, names) for each in some]

    return detect, sorted({name for name in names.values() if name})


def _model(path: str, place: str) -> tuple[Any, bool]:
    """(the network, whether it gives masks); one with all its weights, or a UserError."""
    from safetensors import SafetensorError
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto as auto

    local = Path(path).is_dir()
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=local)
        has_masks = config.model_type in _WITH_MASKS
        if has_masks:
            kind: Any = auto.AutoModelForUniversalSegmentation
        elif type(config) in auto.MODEL_FOR_OBJECT_DETECTION_MAPPING.keys():  # noqa: SIM118 - lazy
            kind = auto.AutoModelForObjectDetection
        else:
            raise UserError(
                f"{place}: {path!r} is a {config.model_type} model; name one for object detection,"
                f" or one of {', '.join(_WITH_MASKS)}"
            )
        model, found = kind.from_pretrained(
            path,
            use_safetensors=True,
            dtype=torch.float32,
            local_files_only=local,
            output_loading_info=True,
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"{place}: cannot load {path!r}: {read_reason(error)}") from error
    if found["missing_keys"]:
        raise UserError(
            f"{place}: {path!r} is damaged or of another model: it has no"
            f" {sorted(found['missing_keys'])[0]}"
        )
    return model, has_masks


def _class_name(name: str) -> str:
    """A model's name of a class as GenEval writes it; "" for the places that COCO leaves empty."""
    name = name.strip().lower().replace("_", " ").replace("-", " ")
    return "" if name in ("n/a", "") or name.startswith("label ") else _ALIASES.get(name, name)


def _inputs(processor: Any, pictures_NCHW: np.ndarray, device: str) -> dict[str, torch.Tensor]:
    made = processor(
        images=[torch.from_numpy(np.array(one)) for one in pictures_NCHW],
        input_data_format="channels_first",
        return_tensors="pt",
    )
    known = ("pixel_values", "pixel_mask")
    return {name: made[name].to(device) for name in known if name in made}


def _boxes(
    processor: Any, outputs: Any, count: int, size: tuple[int, int]
) -> list[list[tuple[int, Detection]]]:
    """(label, detection) of every box, by the model's own rule."""
    made = processor.post_process_object_detection(
        outputs, threshold=0.0, target_sizes=[size] * count
    )
    return [_boxes_of_one(one) for one in made]


def _boxes_of_one(made: Mapping[str, torch.Tensor]) -> list[tuple[int, Detection]]:
    """Those of one picture."""
    columns = (made[name].tolist() for name in ("labels", "scores", "boxes"))
    found: list[tuple[int, Detection]] = []
    for label, score, (left, top, right, bottom) in zip(*columns, strict=True):
        found.append((int(label), Detection(score, (left, top, right, bottom))))
    return found


def _instances(
    outputs: Any, inputs: Mapping[str, torch.Tensor], size: tuple[int, int]
) -> list[list[tuple[int, Detection]]]:
    """(label, detection) of every instance, with its mask at the picture's size."""
    class_BQC = outputs.class_queries_logits.float()
    mask_BQHW = outputs.masks_queries_logits.float()
    padded = inputs["pixel_values"].shape[-2:]
    made = list[list[tuple[int, Detection]]]()
    for i, (class_QC, mask_QHW) in enumerate(zip(class_BQC, mask_BQHW, strict=True)):
        # without what the processor padded, then at the picture's own size
        mask_1QHW = F.interpolate(mask_QHW[None], padded, mode="bilinear", align_corners=False)
        if "pixel_mask" in inputs:
            inside_HW = inputs["pixel_mask"][i].bool()
            high = int(inside_HW.any(1).sum())
            wide = int(inside_HW.any(0).sum())
            mask_1QHW = mask_1QHW[..., :high, :wide]
        mask_1QHW = F.interpolate(mask_1QHW, size, mode="bilinear", align_corners=False)
        made.append(instances_of_queries(class_QC, mask_1QHW[0]))
    return made


def instances_of_queries(
    class_QC: torch.Tensor, mask_QHW: torch.Tensor
) -> list[tuple[int, Detection]]:
    """(label, detection) of the queries of a mask transformer, at most 100.

    ``class_QC`` are logits whose last class is "nothing", ``mask_QHW`` logits at the picture's
    size. A pair of query and class is an instance; its confidence is the class's probability times
    the mean of the mask's probability over the pixels where it exceeds one half. Its box holds
    those pixels. One without any is left out.

    Source: Cheng 2022, arXiv:2112.01527, as mmdetection scores Mask2Former's instances.
    """
    chance_N = class_QC.softmax(-1)[:, :-1].flatten()
    classes = class_QC.shape[-1] - 1
    chance_N, index_N = chance_N.topk(min(_MOST, len(chance_N)))
    made = list[tuple[int, Detection]]()
    for chance, index in zip(chance_N.tolist(), index_N.tolist(), strict=True):
        logits_HW = mask_QHW[index // classes]
        inside_HW = logits_HW > 0
        if not bool(inside_HW.any()):
            continue
        sure = float(logits_HW[inside_HW].sigmoid().mean())
        rows = inside_HW.any(1).nonzero().flatten()
        columns = inside_HW.any(0).nonzero().flatten()
        left, right = float(columns[0]), float(columns[-1] + 1)
        top, bottom = float(rows[0]), float(rows[-1] + 1)
        mask_HW = inside_HW.cpu().numpy()
        found = Detection(chance * sure, (left, top, right, bottom), mask_HW)
        made.append((index % classes, found))
    return made


def _by_class(
    some: list[tuple[int, Detection]], names: Mapping[int, str]
) -> dict[str, list[Detection]]:
    found: dict[str, list[Detection]] = {}
    for label, one in some:
        name = names.get(label, "")
        if name:
            found.setdefault(name, []).append(one)
    return found
