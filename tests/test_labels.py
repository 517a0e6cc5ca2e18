"""Truth files: known boxes from COCO and from what Label Studio exports, and the files that they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from backend.errors import CommandError
from backend.label_studio.label_config import parse_label_config
from scripts.labels import KnownPhoto, KnownPhotos, read_truth
from scripts.train import labelled_photos

TEMPLATES = sorted((Path(__file__).parents[1] / "label_config").glob("*.xml"))
SIZE_WH = (400, 200)
NAN, HUGE = float("nan"), 10**400


def rectangle(x: float, y: float, width: float, height: float, **region: Any) -> dict[str, Any]:
    return {
        "type": "rectanglelabels",
        "from_name": "box",
        "to_name": "image",
        "original_width": SIZE_WH[0],
        "original_height": SIZE_WH[1],
        "value": {"x": x, "y": y, "width": width, "height": height, "rectanglelabels": ["facing"]},
        **region,
    }


def task(number: int, url: str, *annotations: dict[str, Any]) -> dict[str, Any]:
    return {"id": number, "data": {"title": "no link", "image": url}, "annotations": list(annotations)}


def coco(*names: str, boxes: list[Any] | None = None, **image: Any) -> dict[str, Any]:
    """Photos with these names and ids from 1, each with the boxes (xywh)."""
    images = [{"id": i, "file_name": name, "width": 400, "height": 200, **image} for i, name in enumerate(names, 1)]
    annotations = [{"image_id": i, "bbox": box} for i in range(1, len(names) + 1) for box in boxes or []]
    return {"images": images, "annotations": annotations}


def picture(path: Path, size_wh: tuple[int, int] = SIZE_WH) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size_wh).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b c.png"):
        picture(tmp_path / name)
    return tmp_path


def known(folder: Path, content: Any, **options: Any) -> KnownPhotos:
    file = folder / "truth.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_truth(file, folder, **options)


def read(folder: Path, content: Any, **options: Any) -> tuple[KnownPhoto, ...]:
    return known(folder, content, **options).photos


def names_of(photos: tuple[KnownPhoto, ...], folder: Path) -> list[str]:
    return [photo.path.relative_to(folder).as_posix() for photo in photos]


# -- boxes ---------------------------------------------------------------------------------------------------------


def test_coco_boxes_are_boxes_in_pixels_and_crowds_are_apart(folder: Path) -> None:
    content = coco("a.png", boxes=[[10, 20, 30, 40]])
    content["annotations"].append({"image_id": 1, "bbox": [0, 0, 400, 10], "iscrowd": 1})
    (photo,) = read(folder, content)
    assert (photo.number, photo.path, photo.truth.size_wh) == (1, folder / "a.png", SIZE_WH)
    assert photo.truth.boxes_xyxy.tolist() == [[10, 20, 40, 60]]
    assert photo.truth.crowds_xyxy.tolist() == [[0, 0, 400, 10]]


def test_an_exports_rectangles_are_boxes_in_pixels(folder: Path) -> None:
    (photo,) = read(folder, [task(5, "/data/upload/1/a.png", {"result": [rectangle(25, 50, 10, 20)]})])
    assert (photo.number, photo.path, photo.truth.size_wh) == (5, folder / "a.png", SIZE_WH)
    assert photo.truth.boxes_xyxy.tolist() == [[100, 100, 140, 140]]


def test_boxes_without_area_do_not_count_and_a_remark_says_so(folder: Path) -> None:
    of_coco = known(folder, coco("a.png", boxes=[[0, 0, 10, 10], [5, 5, 0, 10], [5, 5, 10, -10]]))
    of_export = known(folder, [task(1, "a.png", {"result": [rectangle(0, 0, 10, 10), rectangle(5, 5, 0, 10)]})])
    assert [len(found.photos[0].truth.boxes_xyxy) for found in (of_coco, of_export)] == [1, 1]
    assert of_coco.remarks == ("2 boxes without area do not count, such as annotations[1].bbox [5.0, 5.0, 0.0, 10.0]",)
    assert of_export.remarks == ("1 rectangles without area do not count",)


def test_the_latest_annotation_that_was_not_cancelled_counts(folder: Path) -> None:
    old = {"result": [rectangle(0, 0, 10, 10)], "updated_at": "2026-01-01T00:00:00Z"}
    new = {"result": [rectangle(50, 50, 10, 10)] * 2, "updated_at": "2026-01-02T00:00:00Z"}
    cancelled = {"result": [rectangle(0, 0, 5, 5)] * 3, "updated_at": "2026-01-03T00:00:00Z", "was_cancelled": True}
    (photo,) = read(folder, [task(1, "a.png", new, old, cancelled)])
    assert len(photo.truth.boxes_xyxy) == 2


def test_tasks_without_rectangles_are_passed_over(folder: Path) -> None:
    keypoint = {"type": "keypointlabels", "original_width": 400, "original_height": 200, "value": {"x": 1, "y": 1}}
    export = [
        task(1, "a.png"),
        task(2, "a.png", {"result": [keypoint, {"type": "relation"}]}),
        task(3, "a.png", {"result": [keypoint, rectangle(0, 0, 10, 10)]}),
    ]
    (photo,) = read(folder, export)
    assert photo.number == 3
    assert len(photo.truth.boxes_xyxy) == 1


def test_only_the_first_photos_are_read_when_limited(folder: Path) -> None:
    content = coco("no.png", "a.png", "b c.png", "gone.png")
    found = known(folder, content, limit=1)
    assert names_of(found.photos, folder) == ["a.png"]
    assert len(found.left_out) == 1, "what comes after the limit is not looked at"


# -- which rectangles are facings --------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("is_accepted", [True, False], ids=["pre-annotated", "drawn by hand"])
def test_a_rough_rectangle_that_was_submitted_is_no_facing(folder: Path, template: Path, is_accepted: bool) -> None:
    controls = parse_label_config(template.read_text()).images[0]
    region: dict[str, Any] = {"from_name": controls.boxes.from_name, "to_name": controls.image_name, "origin": "manual"}
    facings = [rectangle(x, 0, 5, 50, **region) for x in range(0, 40, 10)]
    if is_accepted:
        facings[0]["score"] = 0.9
    (prompt_control,) = controls.prompts.rectangles
    prompt = rectangle(0, 0, 50, 50, **region | {"from_name": prompt_control})
    prompt["value"]["rectanglelabels"] = ["region"]
    found = known(folder, [task(1, "a.png", {"result": [prompt] * 9 + facings})])
    assert len(found.photos[0].truth.boxes_xyxy) == 4, "not the control with the most rectangles"
    assert found.remarks == (f"9 rectangles of control {prompt_control!r} are not facings; use --control to choose",)


def test_what_a_model_made_tells_the_control_of_facings_whatever_it_is_called(folder: Path) -> None:
    facings = [rectangle(0, 0, 10, 10, from_name="prompt", origin="prediction-changed"), rectangle(20, 0, 10, 10)]
    (photo,) = read(folder, [task(1, "a.png", {"result": facings})])
    assert photo.truth.boxes_xyxy.tolist() == [[0, 0, 40, 20]]


def test_of_several_controls_drawn_by_hand_the_user_names_those_of_facings(folder: Path) -> None:
    drawn = [rectangle(0, 0, 10, 10, from_name=name) for name in ("drinks", "food", "food", "price")]
    export = [task(1, "a.png", {"result": drawn})]
    with pytest.raises(CommandError, match=r"several controls, 'drinks' \(1\), 'food' \(2\), 'price' \(1\).*--control"):
        read(folder, export)
    (photo,) = read(folder, export, controls=["drinks", "food"])
    assert len(photo.truth.boxes_xyxy) == 3
    with pytest.raises(CommandError, match=r"--control: expected one with rectangles, 'drinks' .* got 'box'"):
        read(folder, export, controls=["box"])
    with pytest.raises(CommandError, match="--control is for Label Studio exports"):
        read(folder, coco("a.png"), controls=["box"])


def test_each_labelled_image_of_a_task_is_a_photo_of_its_own(folder: Path) -> None:
    regions = [rectangle(0, 0, 10, 10), rectangle(20, 0, 10, 10, from_name="box2", to_name="second")]
    data = {"image": "/x/a.png", "second": "/x/b%20c.png"}
    export = [{"id": 1, "data": data, "annotations": [{"result": [{**region, "score": 0.5} for region in regions]}]}]
    first, second = read(folder, export)
    assert names_of((first, second), folder) == ["a.png", "b c.png"]
    assert (len(first.truth.boxes_xyxy), len(second.truth.boxes_xyxy)) == (1, 1)
    assert second.truth.boxes_xyxy[0, 0] == 80


def test_the_photo_of_an_image_is_the_link_of_its_name_else_the_one_that_is_there(folder: Path) -> None:
    result = [rectangle(0, 0, 10, 10)]
    by_name = {"plan": "/x/b%20c.png", "image": "/x/a.png"}
    only_one_there = {"plan": "/x/plan.png", "shelf": {"url": "/x/a.png"}}
    both_there = {"one": "/x/a.png", "two": "/x/b%20c.png"}
    export = [{"id": 1, "data": data, "annotations": [{"result": result}]} for data in (by_name, only_one_there)]
    assert names_of(read(folder, export), folder) == ["a.png", "a.png"]
    with pytest.raises(CommandError, match=r"ambiguous: expected one such photo, found 'a.png', 'b c.png'"):
        read(folder, [{"id": 1, "data": both_there, "annotations": [{"result": result}]}])


# -- which file a photo is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "/data/upload/1/0a1b2c3d-a.png",
        "/data/local-files/?d=shelves/a.png",
        "/data/local-files/?d=shelves%2Fa.png",
        "s3://bucket/deep/a.png",
        "https://example.org/a.png?token=x",
    ],
)
def test_an_exports_photo_is_found_by_its_link(folder: Path, url: str) -> None:
    assert names_of(read(folder, [task(1, url, {"result": [rectangle(0, 0, 10, 10)]})]), folder) == ["a.png"]


def test_a_name_with_spaces_is_found_though_links_quote_it(folder: Path) -> None:
    export = [task(1, "/data/upload/1/b%20c.png", {"result": [rectangle(0, 0, 10, 10)]})]
    assert names_of(read(folder, export), folder) == ["b c.png"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("store1/1.png", "store1/1.png"),
        ("store2/1.png", "store2/1.png"),
        ("./store2/1.png", "store2/1.png"),
        ("store2\\1.png", "store2/1.png"),
        ("/data/images/store2/1.png", "store2/1.png"),
        ("../images/store1/1.png", "store1/1.png"),
        ("elsewhere/2.png", "store2/2.png"),
        ("1.png", None),
        ("store3/1.png", None),
        ("store1/3.png", None),
        ("x" * 5000 + ".png", None),
        ("a\0.png", None),
        ("..", None),
    ],
)
def test_photos_are_matched_by_their_path_then_by_a_last_name_that_only_one_has(
    tmp_path: Path, name: str, found: str | None
) -> None:
    for path in ("store1/1.png", "store2/1.png", "store2/2.png", "0.png"):
        picture(tmp_path / path)
    result = known(tmp_path, coco("0.png", name))
    assert names_of(result.photos, tmp_path) == ["0.png", *([found] if found else [])]
    assert len(result.left_out) == (found is None)


def test_a_file_that_one_name_means_with_its_whole_path_is_not_taken_for_another(tmp_path: Path) -> None:
    picture(tmp_path / "store1" / "1.png")
    result = known(tmp_path, coco("store2/1.png", "store1/1.png"))
    assert [photo.number for photo in result.photos] == [2]
    (line,) = result.left_out
    assert line.startswith("'store2/1.png': missing; ")


def test_ambiguous_photos_are_named_with_what_they_may_be(tmp_path: Path) -> None:
    for path in ("a/1.png", "b/1.png", "2.png"):
        picture(tmp_path / path)
    (line,) = known(tmp_path, coco("1.png", "2.png")).left_out
    assert line == "'1.png': ambiguous: expected one such photo, found 'a/1.png', 'b/1.png'"


# -- files that are refused ----------------------------------------------------------------------------------------


def with_image(**fields: Any) -> dict[str, Any]:
    content = coco("a.png")
    content["images"][0] |= fields
    return content


def with_box(box: Any) -> dict[str, Any]:
    return coco("a.png", boxes=[box])


@pytest.mark.parametrize(
    ("content", "culprit"),
    [
        ("", "got no JSON"),
        ("{", "got no JSON"),
        ("[" * 100_000, "nested too deep"),
        ("[]", "names none"),
        ("3", "got 3"),
        ("null", "got None"),
        ("[1]", r"\[0\]: expected a task .* got 1"),
        ("{}", "images: expected a list, got None"),
        ({"images": []}, "annotations: expected a list, got None"),
        ({"images": [], "annotations": []}, "names none"),
        ({"images": [3], "annotations": []}, r"images\[0\]: expected an object, got 3"),
        (coco("no.jpg"), "'no.jpg': missing"),
        (with_image(file_name=None), r"images\[0\].file_name: expected the photo's path, got None"),
        (with_image(file_name=""), r"file_name: expected the photo's path, got ''"),
        (with_image(id=None), r"images\[0\].id: expected a whole number or a text, got None"),
        (with_image(width="400"), r"width: expected a whole number of pixels, got '400'"),
        (with_image(width=-400), r"width: .* got -400"),
        (with_image(height=NAN), r"height: .* got nan"),
        (with_image(height=HUGE), r"height: .* got 1000"),
        (with_image(height=None), r"height: .* got None"),
        (coco("a.png", "b c.png", id=1), r"images\[1\].id: expected each id once, got 1 again"),
        ({**coco("a.png"), "annotations": [{"image_id": 2, "bbox": [0, 0, 1, 1]}]}, r"annotations\[0\].image_id: .* 2"),
        ({**coco("a.png"), "annotations": [{"image_id": 1}]}, r"annotations\[0\].bbox: .* got None"),
        ({**coco("a.png"), "annotations": [[]]}, r"annotations\[0\]: expected an object"),
        (with_box([0, 0, 1]), r"bbox: expected \[x, y, width, height\]"),
        (with_box([0, 0, NAN, 1]), r"annotations\[0\].bbox: expected numbers of pixels, got nan"),
        (with_box([0, 0, float("inf"), 1]), "got inf"),
        (with_box([0, 0, HUGE, 1]), "got 1000"),
        (with_box([0, 0, "9", 1]), "got '9'"),
        (with_box([0, 0, True, 1]), "got True"),
        ([{"id": 1, "image": "a.png", "label": []}], r"\[0\]: expected a task with its annotations"),
        ([task(1, "a.png", {"results": []})], r"\[0\].annotations\[0\]: expected an annotation with its result"),
        ([task(1, "no link at all", {"result": [rectangle(0, 0, 9, 9)]})], "expected a link to a photo"),
        ([task(1, "/no.jpg", {"result": [rectangle(0, 0, 9, 9)]})], "'/no.jpg': missing"),
        ([task(1, "a.png", {"result": [rectangle(0, 0, NAN, 9)]})], "width: expected a finite number, got nan"),
        ([task(1, "a.png", {"result": [rectangle(0, 0, HUGE, 9)]})], "width: expected a finite number"),
        ([task(1, "a.png", {"result": [rectangle(0, 0, 9, 9, value=None)]})], "expected a rectangle's value, got None"),
        ([task(1, "a.png", {"result": [rectangle(0, 0, 9, 9, original_width=0)]})], "size in pixels, got 0 x 200"),
        ([task(1, "a.png", {"result": [rectangle(0, 0, 9, 9, original_width="x")]})], "original_width: .* got 'x'"),
    ],
)
def test_a_file_that_is_not_what_its_format_says_is_refused_in_one_line(
    folder: Path, content: Any, culprit: str
) -> None:
    with pytest.raises(CommandError, match=culprit) as caught:
        read(folder, content)
    assert "\n" not in str(caught.value)


def test_a_file_or_a_folder_that_is_not_there_is_refused_in_one_line(folder: Path) -> None:
    with pytest.raises(CommandError, match=r"no\.json': cannot be read: No such file"):
        read_truth(folder / "no.json", folder)
    (folder / "truth.json").write_text(json.dumps(coco("a.png")))
    with pytest.raises(CommandError, match="no': expected a folder of photos"):
        read_truth(folder / "truth.json", folder / "no")


# -- folders of label files ----------------------------------------------------------------------------------------

VOC = """<annotation>
  <folder>photos</folder><filename>a.png</filename>
  <size><width>400</width><height>200</height><depth>3</depth></size>
  <object><name>Coke 0.5l</name><difficult>0</difficult>
    <bndbox><xmin>11</xmin><ymin>21</ymin><xmax>60</xmax><ymax>120</ymax></bndbox></object>
  <object><name>Twix</name><bndbox><xmin>100</xmin><ymin>1</ymin><xmax>99</xmax><ymax>50</ymax></bndbox></object>
</annotation>"""


def supervisely(*objects: dict[str, Any], **size: Any) -> dict[str, Any]:
    return {"description": "", "tags": [], "size": {"width": 400, "height": 200, **size}, "objects": list(objects)}


def supervisely_box(label: str, *corners: list[Any]) -> dict[str, Any]:
    points = {"exterior": list(corners), "interior": []}
    return {"classTitle": label, "geometryType": "rectangle", "points": points}


def label_folder(folder: Path, name: str, content: str | dict[str, Any]) -> Path:
    labels = folder / "labels"
    labels.mkdir()
    (labels / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return labels


def test_pascal_voc_counts_from_one_and_includes_its_last_pixel(folder: Path) -> None:
    known = read_truth(label_folder(folder, "a.xml", VOC), folder)

    (photo,) = known.photos
    assert photo.path == folder / "a.png"
    assert photo.truth.size_wh == SIZE_WH
    assert photo.truth.boxes_xyxy.tolist() == [[10, 20, 60, 120]]
    assert known.remarks == ("1 boxes without area do not count",)


def test_superviselys_rectangles_are_boxes_and_only_those_with_the_label_where_it_is_named(folder: Path) -> None:
    objects = (
        supervisely_box("Product", [60, 120], [10, 20]),
        supervisely_box("Price", [0, 0], [20, 10]),
        {"classTitle": "Product", "geometryType": "polygon", "points": {"exterior": [[0, 0], [9, 0], [9, 9]]}},
    )
    labels = label_folder(folder, "a.png.json", supervisely(*objects))

    (everything,) = read_truth(labels, folder).photos
    products = read_truth(labels, folder, labels=["Product"])

    assert everything.truth.boxes_xyxy.tolist() == [[10, 20, 60, 120], [0, 0, 20, 10]]
    assert products.photos[0].truth.boxes_xyxy.tolist() == [[10, 20, 60, 120]]
    assert products.remarks == ("1 boxes have other labels than Product and do not count",)


@pytest.mark.parametrize(
    ("name", "content", "culprit"),
    [
        ("a.txt", "", "the folder has none"),
        ("a.xml", "<annotation>", "a.xml': expected Pascal VOC, got no XML"),
        ("a.xml", "<note/>", "expected Pascal VOC's <annotation>, got <note>"),
        ("a.xml", "<annotation/>", "filename: expected the photo's name"),
        ("a.xml", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "document type"),
        ("a.xml", VOC.replace("<xmax>60", "<xmax>wide"), "object 1: xmax: expected a number of pixels, got 'wide'"),
        ("a.xml", VOC.replace("<xmax>60</xmax>", ""), "object 1: xmax: .* got None"),
        ("a.xml", VOC.replace("<width>400", "<width>0"), "size/width: expected a whole number of pixels, got '0'"),
        ("a.png.json", "{", "a.png.json': expected Supervisely's JSON, got no JSON"),
        ("a.png.json", "[]", "expected Supervisely's object with a size"),
        ("a.png.json", "[" * 100_000, "a.png.json': maximum recursion"),
        ("a.png.json", {"size": {"width": 400, "height": 200}}, "objects: expected a list, got None"),
        ("a.png.json", supervisely(width=None), "size.width: .* got None"),
        (
            "a.png.json",
            supervisely(supervisely_box("Product", [0, 0])),
            r"objects\[0\].points.exterior: .* two corners",
        ),
        ("a.png.json", supervisely(supervisely_box("Product", [0, 0], [1, NAN])), "number of pixels, got nan"),
    ],
)
def test_a_label_file_that_is_not_what_its_format_says_is_refused_in_one_line(
    folder: Path, name: str, content: str | dict[str, Any], culprit: str
) -> None:
    with pytest.raises(CommandError, match=culprit) as caught:
        read_truth(label_folder(folder, name, content), folder)
    assert "\n" not in str(caught.value)


def test_controls_are_not_named_for_a_folder_of_label_files(folder: Path) -> None:
    with pytest.raises(CommandError, match="--control is for Label Studio exports"):
        read_truth(label_folder(folder, "a.xml", VOC), folder, controls=["box"])


# -- learning from them --------------------------------------------------------------------------------------------


def test_photos_that_cannot_be_used_are_left_out_of_training_with_a_line_each(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "damaged.png").write_bytes(b"no photo")
    picture(folder / "small.png", (30, 20))
    content = coco("damaged.png", "a.png", "small.png", boxes=[[0, 0, 9, 9]])
    assert [photo.path.name for photo in labelled_photos(known(folder, content)).photos] == ["a.png"]
    damaged, small = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert "damaged.png" in damaged
    assert "small.png': expected 400 x 200 px as in the truth file, got 30 x 20 px" in small
    del content["images"][1], content["annotations"][1]
    with pytest.raises(CommandError, match="none of 2 can be used"):
        labelled_photos(known(folder, content))


def test_areas_with_facings_that_nobody_boxed_stay_known_to_training(folder: Path) -> None:
    content = coco("a.png", boxes=[[0, 0, 9, 9], [20, 30, 40, 50]])
    content["annotations"][1]["iscrowd"] = 1
    (photo,) = labelled_photos(known(folder, content)).photos
    assert photo.boxes_xyxy.tolist() == [[0, 0, 9, 9]]
    assert photo.crowds_xyxy.tolist() == [[20, 30, 60, 80]]
