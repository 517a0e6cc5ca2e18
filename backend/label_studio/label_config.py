"""A label config: which images get boxes, which control takes them, which give prompts, which label a box gets.

Knows Label Studio's tags and attributes, as label_studio_sdk reads them. Knows no task, no prompt and no pixel.

Which images get boxes: every `<Image>` with a usable box control, which is a `<RectangleLabels>` with at least one
fixed label. The others are left alone. An `<Image>` of several pages (`valueList`) counts as one without a control, and
a `<Repeater>` around images or their box controls is refused: their regions would need a page or a name that only the
task knows.

Which control of an image takes its boxes: the one with a label marked `predicted_values="facing"`; without a mark, one
with `smart="false"`; else one without `smart`; else one with `smart="true"`. The first in the config wins among
equals.

Which controls give prompts: every keypoint and rectangle control on such an image that Label Studio offers as a smart
tool, which is every one without `smart="false"`. A box control that is smart does both.

Which label a pre-annotated box gets: the one marked `predicted_values="facing"`, else the only one, else the first.

Less sure boxes: a label marked `predicted_values="unsure"` gets the boxes whose score lies below the threshold of the
others, down to its own `model_score_threshold`, or UNSURE_SHARE of the others' threshold.

Messages name tags without angle brackets: Label Studio renders them as HTML, and what stands in brackets vanishes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

from label_studio_sdk.label_interface.control_tags import ControlTag
from label_studio_sdk.label_interface.interface import LabelInterface
from label_studio_sdk.label_interface.object_tags import ObjectTag

from backend.errors import LabelConfigError

# The one class that Facings finds, as it stands in `predicted_values`.
FACING = "facing"
# A facing that is less sure than those that get the default label.
UNSURE = "unsure"
UNSURE_SHARE = 0.8

# Tags in lower case; the `type` of a region is the tag of its control, written so.
KEYPOINT_TYPES = ("keypointlabels", "keypoint")
RECTANGLE_TYPES = ("rectanglelabels", "rectangle")

_BOX_TAG = "rectanglelabels"
_ADD_BOXES = f'RectangleLabels name="box" toName="{{image}}" smart="false" with a Label value="{FACING}" inside'


@dataclass(frozen=True, kw_only=True)
class BoxControl:
    """The `<RectangleLabels>` that boxes are written to.

    labels: its fixed labels in the config's order, at least one; of a label with an alias, the alias.
    default_label: the label of pre-annotated boxes; default_label_reason: why it is this one.
    score_threshold: its `model_score_threshold`, in [0, 1]; None leaves the choice to the engine.
    predicted_values: a name that may come in (the class "facing", a prompt's label) -> the label that claims it.
    unsure_score_threshold: `model_score_threshold` of the label of less sure boxes; None where it has none.
    """

    from_name: str
    to_name: str
    labels: tuple[str, ...]
    default_label: str
    default_label_reason: Literal["marked", "only", "first"]
    score_threshold: float | None
    predicted_values: Mapping[str, str]
    unsure_score_threshold: float | None = None

    def __post_init__(self) -> None:
        for label in (self.default_label, *self.predicted_values.values()):
            if label not in self.labels:
                raise ValueError(f"label: expected one of {self.labels!r}, got {label!r}")

    @property
    def unsure_label(self) -> str | None:
        """The label of less sure boxes; None where they are not wanted."""
        return self.predicted_values.get(UNSURE)

    def least_score(self, score_threshold: float) -> float:
        """The score of the least sure box that is wanted. score_threshold: of those that get the default label."""
        if self.unsure_label is None:
            return score_threshold
        own = UNSURE_SHARE * score_threshold if self.unsure_score_threshold is None else self.unsure_score_threshold
        return min(own, score_threshold)


@dataclass(frozen=True, kw_only=True)
class PromptControls:
    """The names of the controls that give prompts, by the shape they draw."""

    keypoints: tuple[str, ...]
    rectangles: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.keypoints, *self.rectangles)


@dataclass(frozen=True, kw_only=True)
class MaskControl:
    """A `<PolygonLabels>` or `<BrushLabels>` that gets the mask of an answered prompt; labels: at least one."""

    from_name: str
    labels: tuple[str, ...]

    def label_for(self, box_label: str) -> str:
        """The label of the mask of a box labelled `box_label`: the same where this control has it, else its first."""
        return box_label if box_label in self.labels else self.labels[0]


@dataclass(frozen=True, kw_only=True)
class ImageControls:
    """One `<Image>` of a label config and the controls on it.

    image_name: name of the `<Image>`, the `to_name` of its regions.
    image_key: where the photo stands in the task's data, such as "image", "photo.url" or "photos[0]"; resolved by
    `predictions.photo_address`.
    """

    image_name: str
    image_key: str
    boxes: BoxControl
    prompts: PromptControls
    polygons: tuple[MaskControl, ...]
    brushes: tuple[MaskControl, ...]

    def label_for(self, prompt_label: str | None) -> str | None:
        """The label that a prompt asks for: one of `boxes.labels`, or None where it names none.

        A prompt's label that the box control has too is kept; one that a box label lists in its `predicted_values`
        becomes that label; any other, such as a prompt control's own "click", names none.
        """
        if prompt_label is None or prompt_label in self.boxes.labels:
            return prompt_label
        return self.boxes.predicted_values.get(prompt_label)

    def describe(self) -> str:
        """What was understood, as one ASCII line for the log."""
        why = {"marked": f'marked predicted_values="{FACING}"', "only": "the only one", "first": "the first"}
        masks = [*self.polygons, *self.brushes]
        unsure = f", less sure ones with label {self.boxes.unsure_label!a}" if self.boxes.unsure_label else ""
        return (
            f"boxes go to {self.boxes.from_name!a} on image {self.image_name!a} (task key {self.image_key!a}) with "
            f"label {self.boxes.default_label!a} ({why[self.boxes.default_label_reason]}){unsure}; prompts "
            f"come from keypoints {_names(self.prompts.keypoints)} and rectangles {_names(self.prompts.rectangles)}; "
            f"masks go to {_names([control.from_name for control in masks])}"
        )


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """What Facings needs of a label config.

    images: those with a control that takes boxes, in the config's order; at least one.
    left_alone: one line for each other image, with the reason why it gets no boxes.
    """

    images: tuple[ImageControls, ...]
    left_alone: tuple[str, ...] = ()

    def model_version(self, engine_version: str) -> str:
        """The version of predictions for this config: the engine's, with a suffix where the config's own thresholds
        decide which boxes there are."""
        changed = [
            (boxes.from_name, boxes.score_threshold, boxes.unsure_label, boxes.unsure_score_threshold)
            for boxes in (image.boxes for image in self.images)
            if boxes.score_threshold is not None or boxes.unsure_label is not None
        ]
        return (
            f"{engine_version}-{hashlib.sha256(repr(changed).encode()).hexdigest()[:4]}" if changed else engine_version
        )

    def describe(self) -> str:
        """What was understood, as one ASCII line for the log."""
        return "; ".join([*(image.describe() for image in self.images), *self.left_alone])


@lru_cache(maxsize=256)
def parse_label_config(xml: str) -> LabelConfig:
    """Read a label config; of a config without a usable box control, the LabelConfigError names what to add.

    A config is read once: the result is frozen, and kept for the configs that were read last.
    """
    interface = _read(xml)
    images = {str(tag.name): tag for tag in interface.objects if str(tag.tag).lower() == "image"}
    if not images:
        raise _refusal('no Image to label: add an Image with name="image" and value="$image"')
    controls: list[ControlTag] = list(interface.controls)
    candidates = [control for control in controls if _tag(control) == _BOX_TAG]
    if not candidates:
        raise _no_box_control(controls, next(iter(images)))
    flaws = {str(control.name): _flaw(control, images) for control in candidates}
    read: list[ImageControls] = []
    left_alone: list[str] = []
    for name, tag in images.items():
        on_image = [control for control in controls if _image_of(control, images) == name]
        boxes = [control for control in on_image if _tag(control) == _BOX_TAG]
        usable = [control for control in boxes if flaws[str(control.name)] is None]
        if usable:
            read.append(_image_controls(tag, min(usable, key=_preference), on_image))
        else:
            reason = flaws[str(boxes[0].name)] if boxes else "no RectangleLabels has it as its toName"
            left_alone.append(f"image {name!a} gets no boxes: {reason}")
    if not read:
        raise _refusal(str(flaws[str(candidates[0].name)]))
    return LabelConfig(images=tuple(read), left_alone=tuple(left_alone))


def _read(xml: str) -> LabelInterface:
    if not isinstance(xml, str) or not xml.strip():
        raise _refusal(f"expected a label config in XML, got {xml!a}")
    if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise _refusal("expected plain XML tags, got a document type or entity declaration: remove it")
    try:
        interface = LabelInterface(xml)
        *_, tree = interface.parse(xml)
    except Exception as error:  # the SDK lets errors of lxml, pydantic and its own through, without a common base
        reason = str(error).partition(" (<string>")[0]
        raise _refusal(f"not readable as XML tags: {reason}") from error
    for repeater in tree.iter("{*}Repeater", "{*}repeater"):
        if any(str(tag.tag).lower() in ("image", _BOX_TAG) for tag in repeater.iter()):
            raise _refusal(
                "a Repeater around images is not supported: write an Image of its own for each photo of a task, such "
                'as name="first" value="$photos[0]", each with its own RectangleLabels'
            )
    return interface


def _no_box_control(controls: Sequence[ControlTag], image_name: str) -> LabelConfigError:
    bare = [control for control in controls if _tag(control) == "rectangle"]
    found = f"Rectangle name={bare[0].name!a} holds boxes without a label" if bare else "no control takes boxes"
    return _refusal(f"{found}: add {_ADD_BOXES.format(image=image_name)}")


def _flaw(control: ControlTag, images: Mapping[str, ObjectTag]) -> str | None:
    """Why this control cannot take boxes and what to add, or None if it can."""
    name = f"RectangleLabels name={control.name!a}"
    image_name = _image_of(control, images)
    if not image_name:
        target = ",".join(control.to_name or ())
        return f"{name} points at {target!a}, which is no Image: set toName to {_names(images)}"
    image = images[image_name]
    if _attribute(image, "valueList"):
        return f'Image name={image_name!a} has a valueList, several photos: give it one photo, such as value="$image"'
    value = _attribute(image, "value")
    if not value.startswith("$") or value == "$":
        return f'Image name={image_name!a} has value {value!a}: set the key of the photo in the task, value="$image"'
    if not control.labels:
        source = "takes its labels from each task" if control.dynamic_value else "has no label"
        return f'{name} {source}: add at least one Label value="{FACING}" inside'
    return None


def _image_controls(image: ObjectTag, box_control: ControlTag, on_image: Sequence[ControlTag]) -> ImageControls:
    smart = [control for control in on_image if _is_smart(control)]
    return ImageControls(
        image_name=str(image.name),
        image_key=_attribute(image, "value").removeprefix("$"),
        boxes=_boxes(box_control, str(image.name)),
        prompts=PromptControls(
            keypoints=tuple(str(control.name) for control in smart if _tag(control) in KEYPOINT_TYPES),
            rectangles=tuple(str(control.name) for control in smart if _tag(control) in RECTANGLE_TYPES),
        ),
        polygons=_mask_controls(on_image, "polygonlabels"),
        brushes=_mask_controls(on_image, "brushlabels"),
    )


def _preference(control: ControlTag) -> tuple[bool, int]:
    is_marked = FACING in _predicted_values(control)
    return not is_marked, {"false": 0, "": 1}.get(_flag(control, "smart"), 2)


def _boxes(control: ControlTag, image_name: str) -> BoxControl:
    labels = tuple(control.labels or ())
    predicted_values = _predicted_values(control)
    unsure = predicted_values.get(UNSURE)
    sure = [label for label in labels if label != unsure]
    if not sure:
        raise _refusal(f"{control.name!a} has labels for unsure boxes only: add a Label value={FACING!a}")
    reason: Literal["marked", "only", "first"] = "only" if len(sure) == 1 else "first"
    return BoxControl(
        from_name=str(control.name),
        to_name=image_name,
        labels=labels,
        default_label=predicted_values.get(FACING, sure[0]),
        default_label_reason="marked" if FACING in predicted_values else reason,
        score_threshold=_score_threshold(control.get_attr("model_score_threshold"), control.name),
        predicted_values=MappingProxyType(predicted_values),
        unsure_score_threshold=_score_threshold(
            (control.labels_attrs or {})[unsure].attr.get("model_score_threshold") if unsure else None, unsure
        ),
    )


def _predicted_values(control: ControlTag) -> dict[str, str]:
    claims: dict[str, str] = {}
    for label, tag in (control.labels_attrs or {}).items():
        for name in filter(None, (part.strip() for part in tag.attr.get("predicted_values", "").split(","))):
            if claims.setdefault(name, label) != label:
                raise _refusal(
                    f"predicted_values={name!a} stands on two labels of {control.name!a}, {claims[name]!a} and "
                    f"{label!a}: keep it on one"
                )
    return claims


def _score_threshold(text: str | None, name: str | None) -> float | None:
    if text is None:
        return None
    try:
        threshold = float(text)
    except ValueError:
        threshold = math.nan
    if not 0 <= threshold <= 1:
        raise _refusal(f"model_score_threshold of {name!a}: expected a number from 0 to 1, got {text!a}")
    return threshold


def _mask_controls(controls: Sequence[ControlTag], tag: str) -> tuple[MaskControl, ...]:
    found = [control for control in controls if _tag(control) == tag and control.labels]
    return tuple(MaskControl(from_name=str(control.name), labels=tuple(control.labels or ())) for control in found)


def _image_of(control: ControlTag, images: Mapping[str, ObjectTag]) -> str:
    """The first image that the control points at; "" if none."""
    return next((name.strip() for name in control.to_name or () if name.strip() in images), "")


def _tag(control: ControlTag) -> str:
    return str(control.tag).lower()


def _attribute(tag: ControlTag | ObjectTag, name: str) -> str:
    """An attribute without the blanks around it; "" where it is missing. The case of its name does not matter."""
    return str(tag.get_attr(name, "")).strip()


def _flag(control: ControlTag, name: str) -> str:
    return _attribute(control, name).lower()


def _is_smart(control: ControlTag) -> bool:
    # Label Studio's own default of `smart` is true; `smartOnly` offers the smart tool whatever `smart` is.
    return _flag(control, "smart") != "false" or _flag(control, "smartOnly") == "true"


def _names(names: Any) -> str:
    return ", ".join(f"{name!a}" for name in names) or "none"


def _refusal(message: str) -> LabelConfigError:
    return LabelConfigError(f"label config: {message}")
