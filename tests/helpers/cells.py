"""A COCO-format folder as a user brings it, of a few drawn pictures."""

import json

from PIL import Image

CLASSES = ("RBC", "WBC", "Platelets")


def cells(root, *, objects=3, masks=False, size=(64, 48), val_classes=CLASSES, pictures=1):
    """Write ``train`` and ``val``: category ids from 4 on, ``objects`` boxes in each picture."""
    for split, classes in (("train", CLASSES), ("val", val_classes)):
        (root / "images" / split).mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        images = [
            {"id": 7 + n, "file_name": f"cell_{n}.png", "width": size[0], "height": size[1]}
            for n in range(pictures)
        ]
        annotations = []
        for image in images:
            Image.new("RGB", size, "white").save(root / "images" / split / image["file_name"])
            for index in range(objects):
                x, y, width, height = index % 40, 5, 12, 10
                one = {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": 4 + index % 3,
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
                if masks:
                    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
                    one["segmentation"] = [corners]
                annotations.append(one)
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 4 + i, "name": name} for i, name in enumerate(classes)],
        }
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root


def change(root, split, alter):
    """Change the annotations of a split: ``alter`` gets the content of the file."""
    file = root / "annotations" / f"{split}.json"
    content = json.loads(file.read_text())
    alter(content)
    file.write_text(json.dumps(content))


def spoil(content):
    """For :func:`change`: one box ignored, a crowd, one outside, one flat, one too thin."""
    one = content["annotations"]
    one[0]["ignore"] = 1
    one[1]["iscrowd"] = 1
    one[2]["bbox"] = [-30, 0, 20, 20]
    one[3]["area"] = 0
    one[4]["bbox"] = [3, 3, 0.5, 20]
