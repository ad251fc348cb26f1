"""Ground truth and detections in COCO's format, drawn at random, with every kind of mistake."""

import numpy as np

CLASSES = ("cat", "dog", "cow", "owl")


def random_scenes(seed, pictures=12, objects=5, classes=3, ties=True, crowds=False):
    """The content of an annotation file and a list of detections; the last class has no object."""
    rng = np.random.default_rng(seed)
    names = CLASSES[: classes + 1]
    images, annotations, found = [], [], []
    for i in range(pictures):
        images.append({"id": 10 + i, "file_name": f"{i}.png", "width": 100, "height": 100})
        for _ in range(int(rng.integers(0, objects + 1))):
            x, y = rng.integers(0, 60, 2).tolist()
            w, h = rng.integers(10, 40, 2).tolist()
            label = int(rng.integers(classes))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 + i,
                    "category_id": 1 + label,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(crowds and rng.random() < 0.1),
                }
            )
            for _ in range(int(rng.integers(0, 4))):
                shift = rng.normal(0, rng.choice([0.5, 4.0, 9.0]), 4).tolist()
                other = int(rng.integers(classes + 1)) if rng.random() < 0.4 else label
                box = [x + shift[0], y + shift[1], max(2, w + shift[2]), max(2, h + shift[3])]
                found.append((10 + i, 1 + other, box))
        for _ in range(int(rng.integers(0, 3))):
            box = [*rng.integers(0, 80, 2).tolist(), *rng.integers(5, 20, 2).tolist()]
            found.append((10 + i, 1 + int(rng.integers(classes + 1)), box))
    scores = rng.random(len(found))
    if ties:
        scores = np.round(scores, 1)
    detections = [
        {
            "image_id": image,
            "category_id": category,
            "bbox": [float(v) for v in box],
            "score": float(s),
        }
        for (image, category, box), s in zip(found, scores, strict=True)
    ]
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": n, "name": name} for n, name in enumerate(names, start=1)],
    }
    return content, detections
