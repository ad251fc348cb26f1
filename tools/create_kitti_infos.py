#!/usr/bin/env python
"""Check a folder in KITTI's layout and write MMDetection3D's info files for it."""

import argparse
import os
import pickle
import sys
from pathlib import Path

from polyfocal.data.kitti import DONT_CARE, KittiError, load_split
from polyfocal.errors import UserError
from polyfocal.experiments.command_line import run_tool

DESCRIPTION = """\
Check every file of a folder in KITTI's layout and write MMDetection3D's info files (version 2) for
it, kitti_infos_train.pkl and the like: one for each of train, val, trainval and test that ROOT
names in ImageSets. Neither a GPU nor nuscenes-devkit is needed. polyfocal's own tools read the
folder itself (--data ROOT) and need no info files; MMDetection3D's do."""

EPILOG = """\
the layout:
  ROOT/ImageSets/train.txt val.txt    names of frames, one a line
  ROOT/training/velodyne/000123.bin   points, float32: x, y, z, intensity
  ROOT/training/label_2/000123.txt    objects, 15 fields a line
  ROOT/training/calib/000123.txt      P2, R0_rect, Tr_velo_to_cam
  ROOT/training/image_2/000123.png    or .jpg; optional
  ROOT/testing                        the same without labels, for test.txt

examples:
  python tools/create_kitti_infos.py data/kitti
  python tools/create_kitti_infos.py data/kitti --out work_dirs/infos
"""

SPLITS = ("train", "val", "trainval", "test")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, metavar="ROOT", help="the folder in KITTI's layout")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where to write the info files (default ROOT)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_tool(
        lambda args: create(args.root, args.out or args.root), parse_args(argv), goes_on_with=None
    )


def create(root: Path, out: Path) -> None:
    """Describe all splits, then write their files: a bad split leaves no file of another."""
    splits = [split for split in SPLITS if (root / "ImageSets" / f"{split}.txt").is_file()]
    if not splits:
        raise KittiError(
            f"{root} has none of ImageSets/{', '.join(f'{split}.txt' for split in SPLITS)}: they "
            "name the frames of a split, one a line."
        )
    found = {split: load_split(root, split) for split in splits}
    for split, described in found.items():
        content = described.infos
        file = out / f"kitti_infos_{split}.pkl"
        temporary = file.with_name(f".{file.name}.part")
        try:
            out.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(pickle.dumps(content))
            os.replace(temporary, file)
        except OSError as error:
            raise UserError(f"Cannot write {file}: {error.strerror}.") from error
        finally:
            if out.is_dir():
                temporary.unlink(missing_ok=True)
        frames = content["data_list"]
        cared = [
            one for frame in frames for one in frame.get("instances", ()) if one["bbox_label"] >= 0
        ]
        points = sum(one["num_lidar_pts"] for one in cared)
        print(
            f"{file}: {len(frames)} frames, {len(cared)} objects that are no {DONT_CARE}, "
            f"{points} points in them"
        )
        for note in described.notes:
            print(f"note: {note}")


if __name__ == "__main__":
    sys.exit(main())
