"""GenEval's detector and colours on small random models of transformers' own classes, against
transformers' and open_clip's own answers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rlalign.core.prompts import Prompt
from rlalign.core.registry import UserError, build
from rlalign.networks.towers import build_towers
from rlalign.rewards._detectors import _instances, instances_of_queries, load_detector
from rlalign.rewards._geneval_rules import COLOURS, Detection
from rlalign.rewards.base import score
from rlalign.rewards.geneval import crop

LABELS = {0: "cow", 1: "N/A", 2: "mouse", 3: "cat"}


def asks(count=2, tag="two_object", name="cow", **more):
    record = {"tag": tag, "include": [{"class": name, "count": count, **more}], "exclude": []}
    return Prompt(f"{count} of {name}", record)


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    """A YOLOS of two detection tokens, both of which are a cow beyond doubt."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=2,
        id2label=LABELS,
        label2id={name: i for i, name in LABELS.items()},
    )
    model = YolosForObjectDetection(config).eval()
    with torch.no_grad():
        model.class_labels_classifier.layers[-1].bias[0] = 9.0
        for layer in model.bbox_predictor.layers:
            torch.nn.init.normal_(layer.weight, std=1.0)
    folder = tmp_path_factory.mktemp("yolos")
    model.save_pretrained(folder)
    YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """A Mask2Former of four queries."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(1)
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=4,
        id2label=LABELS,
        label2id={name: i for i, name in LABELS.items()},
    )
    model = Mask2FormerForUniversalSegmentation(config).eval()
    folder = tmp_path_factory.mktemp("mask2former")
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(
        size={"shortest_edge": 64, "longest_edge": 128}, size_divisor=32
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """An open_clip file of the tiny architecture."""
    file = tmp_path_factory.mktemp("clip") / "open_clip_model.safetensors"
    towers = build_towers("tiny", seed=3)
    save_file({n: t.contiguous() for n, t in towers.clip.state_dict().items()}, file)
    return {"architecture": "tiny", "weights": str(file)}


@pytest.fixture(scope="module")
def media():
    made = np.random.default_rng(0).integers(0, 256, (3, 1, 3, 40, 56), dtype=np.uint8)
    made[2] = 0  # a blank one
    return made


def reward(detector, clip, **more):
    return build("rewards", {"name": "geneval", "detector": str(detector), **clip, **more})


def asked(made, media, *prompts):
    return score(made, made.load("cpu"), media, prompts).tolist()


# --- detections ----------------------------------------------------------------------------------


def test_boxes_are_those_of_the_models_own_rule(boxes, media):
    from transformers import YolosForObjectDetection, YolosImageProcessor

    detect, names = load_detector(str(boxes), "here", "cpu")
    assert names == ["cat", "computer mouse", "cow"]
    model = YolosForObjectDetection.from_pretrained(boxes).eval()
    processor = YolosImageProcessor.from_pretrained(boxes)
    pictures = [Image.fromarray(m[0].transpose(1, 2, 0)) for m in media]
    with torch.no_grad():
        outputs = model(**processor(images=pictures, return_tensors="pt"))
    own = processor.post_process_object_detection(outputs, 0.0, target_sizes=[(40, 56)] * 3)
    for found, one in zip(detect(media[:, 0]), own, strict=True):
        assert [len(found.get(name, [])) for name in names] == [0, 0, 2]
        boxes_ND = [d.box for d in found["cow"]]
        np.testing.assert_allclose(boxes_ND, one["boxes"].numpy(), rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose([d.score for d in found["cow"]], one["scores"], rtol=1e-5)


def test_instances_are_those_of_the_models_own_rule(masks, media):
    """At the size at which transformers scores masks, so that both resize alike."""
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

    model = Mask2FormerForUniversalSegmentation.from_pretrained(masks).eval()
    processor = Mask2FormerImageProcessor.from_pretrained(masks)
    picture = Image.fromarray(media[0, 0].transpose(1, 2, 0))
    with torch.no_grad():
        outputs = model(**processor(images=[picture], return_tensors="pt"))
    own = processor.post_process_instance_segmentation(
        outputs, threshold=0.0, target_sizes=[(384, 384)], return_binary_maps=True
    )[0]
    big = torch.nn.functional.interpolate(
        outputs.masks_queries_logits, (384, 384), mode="bilinear", align_corners=False
    )
    ours = instances_of_queries(outputs.class_queries_logits[0], big[0])
    ours = sorted(ours, key=lambda pair: -pair[1].score)[: len(own["segments_info"])]
    theirs = sorted(own["segments_info"], key=lambda one: -one["score"])
    assert len(theirs) >= 3
    assert [label for label, _ in ours[:3]] == [one["label_id"] for one in theirs[:3]]
    for (_, one), their in zip(ours[:3], theirs[:3], strict=True):
        assert one.score == pytest.approx(their["score"], abs=1e-5)
        mask_HW = own["segmentation"][their["id"]].bool().numpy()
        np.testing.assert_array_equal(one.mask_HW, mask_HW)
        rows, columns = mask_HW.any(1).nonzero()[0], mask_HW.any(0).nonzero()[0]
        assert one.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def test_a_mask_has_the_pictures_size_without_the_padding(masks, media):
    """40 x 56 pixels become 64 x 90 and are padded to 64 x 96: of two queries the first covers all
    of it, the second the padding alone."""
    detect, _ = load_detector(str(masks), "here", "cpu")
    found = [one for some in detect(media[:1, 0])[0].values() for one in some]
    assert {one.mask_HW.shape for one in found} == {(40, 56)}
    pixel_mask = torch.zeros(1, 64, 96, dtype=torch.long)
    pixel_mask[:, :, :90] = 1
    inputs = {"pixel_values": torch.zeros(1, 3, 64, 96), "pixel_mask": pixel_mask}
    logits = torch.full((1, 2, 16, 24), -1.0)
    logits[0, 0] = 1.0
    logits[0, 1, :, 23] = 1.0
    outputs = SimpleNamespace(
        class_queries_logits=torch.tensor([[[5.0, 0.0], [5.0, 0.0]]]), masks_queries_logits=logits
    )
    [[(_, one)]] = _instances(outputs, inputs, (40, 56))
    assert one.box == (0.0, 0.0, 56.0, 40.0) and one.mask_HW.all()


def test_a_query_without_a_pixel_is_no_instance():
    logits = torch.tensor([[5.0, 0.0], [5.0, 0.0]])
    masks_QHW = torch.stack([torch.full((2, 3), -1.0), torch.tensor([[-1.0, 2, -1], [-1, 0, 1]])])
    [(label, one)] = instances_of_queries(logits, masks_QHW)
    chance = torch.tensor([5.0, 0.0]).softmax(0)[0]
    sure = torch.tensor([2.0, 1.0]).sigmoid().mean()
    assert (label, one.box) == (0, (1.0, 0.0, 3.0, 2.0))
    assert one.score == pytest.approx(float(chance * sure))
    assert one.mask_HW.tolist() == [[False, True, False], [False, False, True]]


# --- scores --------------------------------------------------------------------------------------


def test_scores_follow_what_is_seen(boxes, clip, media):
    """Two cows in every picture, whatever is on it."""
    prompts = [asks(2), asks(1), asks(3)]
    assert asked(reward(boxes, clip), media, *prompts) == [1.0, 1.0, 0.0]
    assert asked(reward(boxes, clip, measure="strict"), media, *prompts) == [1.0, 0.0, 0.0]
    graded = asked(reward(boxes, clip, measure="graded"), media, *prompts)
    assert graded == pytest.approx([1.0, 0.0, 2 / 3])
    assert asked(reward(boxes, clip), media, asks(1, name="cat"), *prompts[:2])[0] == 0.0
    none = asked(reward(boxes, clip, threshold=1.0), media, *prompts)
    assert none == [0.0, 0.0, 0.0]
    exact = reward(boxes, clip, counting_threshold=1.0)
    assert asked(exact, media, asks(2, tag="counting"), *prompts[:2]) == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_one_picture_alone_scores_as_among_others(kind, clip, media, request):
    detector = request.getfixturevalue(kind)
    made = reward(detector, clip, measure="graded", threshold=0.1, batch=2)
    prompts = [asks(1, name="cow", color="red"), asks(2, name="cat"), asks(1, name="cow")]
    scorer = made.load("cpu")
    together = score(made, scorer, media, prompts)
    alone = [score(made, scorer, media[i : i + 1], prompts[i : i + 1])[0] for i in range(3)]
    np.testing.assert_array_equal(together, alone)


def test_a_clip_is_the_mean_of_its_frames(boxes, clip, media):
    frames = media[:, 0][None]
    assert asked(reward(boxes, clip), frames, asks(2)) == [1.0]
    assert asked(reward(boxes, clip), np.concatenate([frames, frames]), asks(3), asks(2)) == [0, 1]


def test_a_colour_is_the_caption_that_fits_best(boxes, clip, media):
    """open_clip's own vectors of what Pillow cuts out; 30 captions in groups of three."""
    made = reward(boxes, clip)
    scorer = made.load("cpu")
    towers = build_towers("tiny", pretrained=clip["weights"]).eval()
    mask_HW = np.zeros((40, 56), dtype=bool)
    mask_HW[5:30, 10:40] = True
    for one in (
        Detection(0.9, (10.2, 5.0, 40.0, 30.4), mask_HW),
        Detection(0.9, (-3.0, 5.0, 40.0, 45.0)),
    ):
        picture = Image.fromarray(media[0, 0].transpose(1, 2, 0))
        if one.mask_HW is not None:
            grey = Image.new("RGB", picture.size, "#999")
            picture = Image.composite(picture, grey, Image.fromarray(one.mask_HW))
        cut = np.asarray(picture.crop(one.box)).transpose(2, 0, 1)
        np.testing.assert_array_equal(crop(media[0, 0], one), cut)
        with torch.no_grad():
            pixels = towers.preprocess(torch.from_numpy(cut.copy())[None].float() / 255)
            image = towers.clip.encode_image(pixels, normalize=True)[0]
            cosines = []
            for colour in COLOURS:
                texts = [f"a photo of a {colour} cow", f"a photo of a {colour}-colored cow"]
                texts.append(f"a photo of a {colour} object")
                mean = towers.clip.encode_text(towers.tokenizer(texts), normalize=True).mean(0)
                cosines.append(float(mean @ image / mean.norm()))
        assert scorer._colour(media[0, 0], one, "cow") == COLOURS[int(np.argmax(cosines))]


def test_a_box_without_width_is_a_pixel_wide(media):
    assert crop(media[0, 0], Detection(0.9, (3.2, 4.0, 3.4, 4.1))).shape == (3, 1, 1)


# --- mistakes ------------------------------------------------------------------------------------


def test_a_prompt_without_a_record_or_of_an_unknown_class_is_named(boxes, clip, media):
    made = reward(boxes, clip, on_error="drop")
    with pytest.raises(UserError, match=r"rewards\.geneval: the prompt 'a cow' has no record"):
        asked(made, media[:2], asks(), "a cow")
    with pytest.raises(UserError, match=r"'1 of caat'.* knows no class 'caat'; did you mean 'cat'"):
        asked(made, media[:1], asks(1, name="caat"))


def test_what_is_no_detector_is_refused(boxes, clip, tmp_path):
    from transformers import BertConfig

    with pytest.raises(UserError, match=r"rewards\.geneval\.detector: cannot load"):
        reward(tmp_path, clip).load("cpu")
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a bert model; name one for object detection"):
        reward(tmp_path, clip).load("cpu")


def test_a_detector_that_lacks_weights_is_refused(boxes, clip, tmp_path):
    for file in boxes.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["class_labels_classifier.layers.2.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"damaged or of another model: it has no class_labels"):
        reward(tmp_path, clip).load("cpu")
