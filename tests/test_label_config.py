"""What is understood of a label config, and the messages about one that cannot be used."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from label_studio_sdk.label_interface.interface import LabelInterface

from backend.errors import LabelConfigError
from backend.label_studio.label_config import BoxControl, ImageControls, parse_label_config

TEMPLATES = sorted((Path(__file__).parents[1] / "label_config").glob("*.xml"))
IMAGE = '<Image name="image" value="$image"/>'
BOX = '<RectangleLabels name="box" toName="image" smart="false"><Label value="facing"/></RectangleLabels>'


def view(*tags: str) -> str:
    return f"<View>{''.join(tags)}</View>"


def parse(*tags: str) -> ImageControls:
    (image,) = parse_label_config(view(*tags)).images
    return image


def message_of(xml: str) -> str:
    """The message that the config is refused with; "" where it is read."""
    try:
        parse_label_config(xml)
    except LabelConfigError as error:
        return str(error)
    return ""


def rectangle_labels(name: str, labels: str, attributes: str = "", to_name: str = "image") -> str:
    return f'<RectangleLabels name="{name}" toName="{to_name}" {attributes}>{labels}</RectangleLabels>'


def test_the_smallest_usable_config_is_an_image_and_a_box_control() -> None:
    config = parse(IMAGE, BOX)
    assert (config.image_name, config.image_key) == ("image", "image")
    assert (config.boxes.from_name, config.boxes.to_name, config.boxes.labels) == ("box", "image", ("facing",))
    assert config.boxes.score_threshold is None
    assert config.prompts.keypoints == config.prompts.rectangles == config.polygons == config.brushes == ()


def test_names_keys_and_nesting_are_the_admins_choice() -> None:
    config = parse(
        "<View><!-- a note --><View>",
        rectangle_labels("Käse", '<View><Label value="Coca&amp;Cola &#252;"/></View>', "", "shelf photo"),
        '</View></View><Style>.x { color: red }</Style><Image name="shelf photo" value="$data_url"/>',
    )
    assert (config.image_name, config.image_key, config.boxes.from_name) == ("shelf photo", "data_url", "Käse")
    assert config.boxes.labels == ("Coca&Cola ü",)


@pytest.mark.parametrize(
    ("controls", "boxes", "rectangle_prompts"),
    [
        ([("a", 'smart="true"', "")], "a", ("a",)),
        ([("a", 'smart="false"', "")], "a", ()),
        ([("a", "", "")], "a", ("a",)),
        ([("a", 'smart="true"', ""), ("b", 'smart="false"', "")], "b", ("a",)),
        ([("a", 'smart="true"', ""), ("b", "", "")], "b", ("a", "b")),
        ([("a", "", ""), ("b", 'smart="False"', "")], "b", ("a",)),
        ([("a", 'smart="true"', ""), ("b", 'smart="true"', "")], "a", ("a", "b")),
        ([("a", 'smart="false"', ""), ("b", 'smart="false"', "")], "a", ()),
        ([("a", 'smart="false"', ""), ("b", 'smart="true"', 'predicted_values="facing"')], "b", ("b",)),
        ([("a", 'smart="false" smartOnly="true"', "")], "a", ("a",)),
    ],
)
def test_the_box_control_is_the_marked_one_then_the_one_that_is_not_smart(
    controls: list[tuple[str, str, str]], boxes: str, rectangle_prompts: tuple[str, ...]
) -> None:
    tags = [rectangle_labels(name, f'<Label value="x" {mark}/>', smart) for name, smart, mark in controls]
    config = parse(IMAGE, *tags)
    assert config.boxes.from_name == boxes
    assert config.prompts.rectangles == rectangle_prompts


def test_prompts_come_from_smart_keypoints_and_rectangles_of_any_tag() -> None:
    config = parse(
        IMAGE,
        '<KeyPointLabels name="k1" toName="image" smart="true"><Label value="click"/></KeyPointLabels>',
        '<KeyPointLabels name="k2" toName="image" smart="false"><Label value="eye"/></KeyPointLabels>',
        '<KeyPoint name="k3" toName="image"/><Rectangle name="r1" toName="image" smart="true"/>',
        BOX,
    )
    assert config.prompts.keypoints == ("k1", "k3")
    assert config.prompts.rectangles == ("r1",)


def test_each_image_with_a_box_control_gets_boxes_and_keeps_its_own_controls() -> None:
    front, back = parse_label_config(
        view(
            '<Image name="front" value="$photos[0]"/><Image name="back" value="$photos[1]"/>',
            rectangle_labels("front_box", '<Label value="facing"/>', 'smart="false"', "front"),
            rectangle_labels("back_box", '<Label value="rear"/>', 'model_score_threshold="0.5"', "back"),
            '<KeyPointLabels name="point" toName="back" smart="true"><Label value="x"/></KeyPointLabels>',
            '<BrushLabels name="mask" toName="front"><Label value="x"/></BrushLabels>',
        )
    ).images
    assert (front.image_name, front.image_key, front.boxes.from_name) == ("front", "photos[0]", "front_box")
    assert (back.image_name, back.image_key, back.boxes.from_name) == ("back", "photos[1]", "back_box")
    assert (front.boxes.to_name, back.boxes.to_name) == ("front", "back")
    assert (front.boxes.default_label, back.boxes.default_label) == ("facing", "rear")
    assert (front.boxes.score_threshold, back.boxes.score_threshold) == (None, 0.5)
    assert (front.prompts.keypoints, back.prompts.keypoints) == ((), ("point",))
    assert (front.prompts.rectangles, back.prompts.rectangles) == ((), ("back_box",))
    assert (len(front.brushes), len(back.brushes)) == (1, 0)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ("", "no RectangleLabels has it as its toName"),
        (rectangle_labels("b", "", to_name="plan"), "RectangleLabels name='b' has no label"),
    ],
)
def test_an_image_without_a_usable_box_control_is_left_alone_and_the_log_has_the_reason(tags: str, reason: str) -> None:
    config = parse_label_config(view('<Image name="plan" value="$plan"/>', tags, IMAGE, BOX))
    assert [image.image_name for image in config.images] == ["image"]
    assert f"image 'plan' gets no boxes: {reason}" in config.describe()


def test_an_image_of_several_pages_is_left_alone() -> None:
    pages = '<Image name="pages" valueList="$pages"/>' + rectangle_labels("b", '<Label value="x"/>', to_name="pages")
    config = parse_label_config(view(pages, IMAGE, BOX))
    assert [image.image_name for image in config.images] == ["image"]
    assert "image 'pages' gets no boxes: Image name='pages' has a valueList" in config.describe()


def test_controls_of_an_image_without_boxes_do_not_mix_with_those_of_another() -> None:
    config = parse(
        '<Image name="plan" value="$plan"/><Image name="photo" value="$photo"/>',
        '<KeyPointLabels name="on_plan" toName="plan" smart="true"><Label value="x"/></KeyPointLabels>',
        '<KeyPointLabels name="on_photo" toName="photo" smart="true"><Label value="x"/></KeyPointLabels>',
        '<PolygonLabels name="outline" toName="plan"><Label value="x"/></PolygonLabels>',
        rectangle_labels("box", '<Label value="facing"/>', 'smart="false"', "photo"),
    )
    assert (config.image_name, config.image_key) == ("photo", "photo")
    assert config.prompts.keypoints == ("on_photo",)
    assert config.polygons == ()


def test_an_unusable_box_control_does_not_hide_a_usable_one() -> None:
    dynamic = '<RectangleLabels name="dynamic" toName="image" value="$labels"/>'
    assert parse(IMAGE, dynamic, BOX).boxes.from_name == "box"


@pytest.mark.parametrize(
    ("labels", "default_label", "reason"),
    [
        ('<Label value="pack"/>', "pack", "only"),
        ('<Label value="tag"/><Label value="pack"/>', "tag", "first"),
        ('<Label value="tag"/><Label value="pack" predicted_values="facing"/>', "pack", "marked"),
        ('<Label value="tag"/><Label value="pack" predicted_values="item , facing"/>', "pack", "marked"),
        ('<Label value="tag"/><Label value="pack" predicted_values="item"/>', "tag", "first"),
        ('<Label value="pack" alias="p"/>', "p", "only"),
    ],
)
def test_preannotated_boxes_get_the_marked_label_else_the_only_else_the_first(
    labels: str, default_label: str, reason: str
) -> None:
    boxes = parse(IMAGE, rectangle_labels("box", labels)).boxes
    assert (boxes.default_label, boxes.default_label_reason) == (default_label, reason)


def test_a_prompts_label_becomes_a_label_of_the_box_control_or_names_none() -> None:
    labels = '<Label value="tag"/><Label value="pack" predicted_values="facing,pack region"/><Label value="box"/>'
    config = parse(IMAGE, rectangle_labels("box", labels))
    expected = {None: None, "click": None, "tag": "tag", "box": "box", "pack region": "pack"}
    assert {name: config.label_for(name) for name in expected} == expected


@pytest.mark.parametrize(("text", "threshold"), [("", None), ("0", 0.0), ("0.35", 0.35), (" 1 ", 1.0)])
def test_the_score_threshold_of_the_box_control_is_read(text: str, threshold: float | None) -> None:
    tag = rectangle_labels("box", '<Label value="x"/>', f'model_score_threshold="{text}"')
    assert parse(IMAGE, tag).boxes.score_threshold == threshold


def test_polygon_and_brush_controls_keep_a_boxs_label_where_they_have_it() -> None:
    config = parse(
        IMAGE,
        BOX,
        '<PolygonLabels name="outline" toName="image"><Label value="other"/><Label value="facing"/></PolygonLabels>',
        '<BrushLabels name="mask" toName="image"><Label value="ink"/></BrushLabels>',
        '<BrushLabels name="no_labels" toName="image" value="$labels"/>',
    )
    assert [(c.from_name, c.label_for("facing")) for c in config.polygons] == [("outline", "facing")]
    assert [(c.from_name, c.label_for("facing")) for c in config.brushes] == [("mask", "ink")]


X, Y = '<Label value="x" predicted_values="facing"/>', '<Label value="y" predicted_values="facing"/>'
LABELS = '<Rectangle name="r" toName="image"/><Labels name="l" toName="image"><Label value="x"/></Labels>'
REPEATER = (
    '<Repeater on="$images" indexFlag="{{i}}"><Image name="image_{{i}}" value="$images[{{i}}]"/>'
    '<RectangleLabels name="box_{{i}}" toName="image_{{i}}"><Label value="facing"/></RectangleLabels></Repeater>'
)
REFUSED = [
    ("", "expected a label config in XML, got ''"),
    ("<View>", "not readable as XML tags: Premature end of data"),
    ("hello", "not readable as XML tags"),
    (view("&nbsp;"), "Entity 'nbsp' not defined"),
    ('<!DOCTYPE a [<!ENTITY b "c">]><View>&b;</View>', "document type or entity declaration"),
    (view('<Text name="t" value="$t"/>'), 'add an Image with name="image" and value="$image"'),
    (
        view(IMAGE),
        'no control takes boxes: add RectangleLabels name="box" toName="image" smart="false" '
        'with a Label value="facing" inside',
    ),
    (view(IMAGE, LABELS), "Rectangle name='r' holds boxes without a label: add RectangleLabels"),
    (view(IMAGE, rectangle_labels("b", "")), "'b' has no label: add at least one Label value=\"facing\" inside"),
    (
        view(IMAGE, '<RectangleLabels name="b" toName="image" value="$labels"/>'),
        "takes its labels from each task: add at least one Label",
    ),
    (
        view(IMAGE, rectangle_labels("b", X, to_name="img")),
        "points at 'img', which is no Image: set toName to 'image'",
    ),
    (
        view('<Image name="image" value="https://host/a.jpg"/>', BOX),
        "has value 'https://host/a.jpg': set the key of the photo in the task, value=\"$image\"",
    ),
    (view('<Image name="image" value="$"/>', BOX), "has value '$': set the key of the photo in the task"),
    (
        view('<Image name="image" valueList="$images"/>', BOX),
        "Image name='image' has a valueList, several photos: give it one photo, such as value=\"$image\"",
    ),
    (view(REPEATER), "a Repeater around images is not supported: write an Image of its own for each photo of a task"),
    (view(IMAGE, BOX, REPEATER), "a Repeater around images is not supported"),
    (view(f"{IMAGE}<Style>a < b</Style>", BOX), "not readable as XML tags: StartTag: invalid element name"),
    (view(IMAGE, rectangle_labels("a&lt;b&gt;", "")), r"name='a\x3cb\x3e' has no label"),
    *(
        (
            view(IMAGE, rectangle_labels("b", X, f'model_score_threshold="{text}"')),
            f"model_score_threshold of 'b': expected a number from 0 to 1, got '{text}'",
        )
        for text in ("high", "1.5", "-0.1", "nan")
    ),
    (
        view(IMAGE, rectangle_labels("b", X + Y)),
        "predicted_values='facing' stands on two labels of 'b', 'x' and 'y': keep it on one",
    ),
    (view(IMAGE, rectangle_labels("Ж&#10;", "")), r"'\u0416\n' has no label"),
    (
        view(IMAGE, rectangle_labels("b", '<Label value="maybe" predicted_values="unsure"/>')),
        "'b' has labels for unsure boxes only: add a Label value='facing'",
    ),
    (
        view(
            IMAGE,
            rectangle_labels("b", X + '<Label value="maybe" predicted_values="unsure" model_score_threshold="2"/>'),
        ),
        "model_score_threshold of 'maybe': expected a number from 0 to 1, got '2'",
    ),
]


@pytest.mark.parametrize(("xml", "message"), REFUSED)
def test_a_config_that_cannot_be_used_is_refused_in_one_ascii_line_that_names_what_to_add(
    xml: str, message: str
) -> None:
    with pytest.raises(LabelConfigError) as caught:
        parse_label_config(xml)
    text = str(caught.value)
    assert message in text
    assert text.isascii()
    assert text.isprintable()
    assert not set(text) & set("<>")


def test_a_repeater_around_other_tags_is_none_of_our_business() -> None:
    notes = '<Repeater on="$notes" indexFlag="{{i}}"><Text name="note_{{i}}" value="$notes[{{i}}]"/></Repeater>'
    assert parse(IMAGE, BOX, notes).boxes.from_name == "box"


@given(st.text())
def test_no_message_about_a_label_config_holds_a_tag_whatever_it_was_made_of(text: str) -> None:
    message = str(LabelConfigError(f"label config: <b>{text}"))
    assert message.isascii()
    assert not set(message) & set("<>")


tags = st.sampled_from([IMAGE, BOX, REPEATER, LABELS, "<", ">", "<a", "&lt;", '<Image name="&lt;"/>', "<View/>"])


@given(st.lists(tags | st.text(max_size=5), max_size=5))
def test_whatever_the_config_it_is_read_or_refused_without_a_tag_in_the_message(parts: list[str]) -> None:
    assert not set(message_of(view(*parts))) & set("<>")


def test_a_box_control_refuses_a_default_label_that_it_does_not_have() -> None:
    with pytest.raises(ValueError, match="expected one of"):
        BoxControl(
            from_name="box",
            to_name="image",
            labels=("facing",),
            default_label="click",
            default_label_reason="first",
            score_threshold=None,
            predicted_values={},
        )


def test_the_description_for_the_log_is_one_ascii_line_with_the_reason() -> None:
    text = parse(IMAGE, rectangle_labels("Käse", '<Label value="ü"/><Label value="b"/>')).describe()
    assert r"label '\xfc' (the first)" in text
    assert r"boxes go to 'K\xe4se'" in text
    assert text.isascii()
    assert text.isprintable()


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_each_template_is_valid_has_a_header_and_keeps_prompts_apart_from_boxes(path: Path) -> None:
    xml = path.read_text(encoding="utf-8")
    LabelInterface(xml).validate()
    assert xml.startswith("<View>\n  <!-- ")
    (config,) = parse_label_config(xml).images
    assert config.boxes.default_label_reason == "marked"
    assert config.prompts.keypoints == ("point",)
    assert config.prompts.rectangles == ("prompt",)
    # Without labels of their own, prompts need no key before each of them, and never mix with boxes.
    assert not LabelInterface(xml).get_control("prompt").labels
    assert not LabelInterface(xml).get_control("point").labels


def test_the_templates_have_the_controls_that_their_names_promise() -> None:
    assert [path.name for path in TEMPLATES] == [
        "shelf_boxes.xml",
        "shelf_classes.xml",
        "shelf_masks.xml",
        "shelf_unsure.xml",
    ]
    configs = {path.stem: parse_label_config(path.read_text(encoding="utf-8")).images[0] for path in TEMPLATES}
    assert len(configs["shelf_classes"].boxes.labels) > 1
    assert configs["shelf_masks"].polygons
    assert configs["shelf_masks"].brushes
    assert configs["shelf_unsure"].boxes.unsure_label == "unsure"
    assert configs["shelf_unsure"].boxes.least_score(0.85) == 0.7
