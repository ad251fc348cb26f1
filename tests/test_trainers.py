"""The programs of docs/trainers.md run as they stand, and train what they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parents[1] / "docs" / "trainers.md").read_text(encoding="utf-8")


def program(heading):
    (found,) = re.findall(rf"^## {re.escape(heading)}\n.*?^```python\n(.*?)^```", PAGE, re.M | re.S)
    return found


def run(heading, namespace=None, change=None):
    code = program(heading)
    for old, new in (change or {}).items():
        assert old in code, old
        code = code.replace(old, new)
    found = {"__name__": "program"} | (namespace or {})
    exec(compile(code, heading, "exec"), found)
    return found


def test_plain_torch_in_a_process_of_its_own(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(program("Plain torch"))
    done = subprocess.run(
        [sys.executable, str(file)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(epoch \d: \d+\.\d+\n){3}", done.stdout)


@pytest.mark.parametrize("gamma", ["2.0", "0.0"])
def test_hugging_face_trainer(tmp_path, monkeypatch, gamma):
    """At gamma 0 the steps are those of the Trainer's own cross-entropy, accumulation included."""
    pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    monkeypatch.chdir(tmp_path)
    ours = run("Hugging Face Trainer", change={"gamma=2.0": f"gamma={gamma}"})
    stock = run("Hugging Face Trainer", change={"    compute_loss_func=compute_loss,\n": ""})
    assert ours["trainer"].state.global_step == 4
    same = [
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(ours["model"].parameters(), stock["model"].parameters(), strict=True)
    ]
    assert all(same) == (gamma == "0.0")


def test_accumulated_steps_of_hugging_face_are_one_of_the_whole_batch(tmp_path, monkeypatch):
    """Two batches of 4 with 4 steps, or one of 8; without the model's normalisation by batch."""
    pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    monkeypatch.chdir(tmp_path)
    by_itself = "for one in model.modules():\n    if hasattr(one, 'normalization'):\n"
    by_itself += "        one.normalization = torch.nn.Identity()\nloss = FocalLoss("
    parts = run("Hugging Face Trainer", change={"loss = FocalLoss(": by_itself})
    one = {
        "train_batch_size=4": "train_batch_size=8",
        "accumulation_steps=2": "accumulation_steps=1",
    }
    whole = run("Hugging Face Trainer", change={"loss = FocalLoss(": by_itself, **one})
    for a, b in zip(parts["model"].parameters(), whole["model"].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_lightning(tmp_path, monkeypatch):
    pytest.importorskip("lightning", reason="needs Lightning: pip install lightning")
    monkeypatch.chdir(tmp_path)
    found = run("Lightning")
    assert found["trainer"].global_step == 8
    assert found["module"].loss.progress() == 1.0


@pytest.fixture
def criterion():
    """RT-DETR's criterion, whatever the program does to it taken back."""
    pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    from transformers.loss.loss_rt_detr import RTDetrLoss

    before = RTDetrLoss.loss_labels_vfl
    yield RTDetrLoss
    RTDetrLoss.loss_labels_vfl = before


# Of the detectors of transformers, what makes them small.
SMALL = dict(
    encoder_in_channels=[8, 8, 8],
    encoder_hidden_dim=16,
    encoder_ffn_dim=16,
    encoder_attention_heads=2,
    feat_strides=[8, 16, 32],
    d_model=16,
    decoder_in_channels=[16, 16, 16],
    decoder_ffn_dim=16,
    decoder_layers=2,
    decoder_attention_heads=2,
    num_queries=20,
    num_denoising=4,
    num_labels=5,
    anchor_image_size=None,
)


def rt_detr():
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(backbone_config=backbone, **SMALL)
    torch.manual_seed(0)
    return RTDetrForObjectDetection(config)


def d_fine():
    from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config

    backbone = HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 8, 8],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 8, 8, 8],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, False, False],
        stage_kernel_size=[3, 3, 3, 3],
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        embedding_size=8,
        out_features=["stage2", "stage3", "stage4"],
    )
    config = DFineConfig(backbone_config=backbone, **SMALL)
    torch.manual_seed(0)
    return DFineForObjectDetection(config)


def step(model):
    """The losses by name, and the gradients of the classifiers, of one step on two pictures."""
    torch.manual_seed(1)
    pictures = torch.randn(2, 3, 64, 64)
    labels = [
        {
            "class_labels": torch.tensor([0, 4, 4]),
            "boxes": torch.tensor(
                [[0.3, 0.3, 0.4, 0.4], [0.7, 0.6, 0.3, 0.5], [0.01, 0.01, 0.01, 0.01]]
            ),
        },
        {"class_labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.9, 0.8]])},
    ]
    model.train()
    model.zero_grad()
    torch.manual_seed(2)
    output = model(pixel_values=pictures, labels=labels)
    output.loss.backward()
    losses = {name: value.detach() for name, value in output.loss_dict.items()}
    # Not the backbone's: its normalisation of so few pixels makes much of every rounding.
    names = ("class_embed.", "score_head.")
    heads = [
        p
        for name, p in model.named_parameters()
        if any(one in name for one in names) and "denoising" not in name
    ]
    return losses, [p.grad.clone() for p in heads if p.grad is not None]


@pytest.mark.parametrize("build", [rt_detr, d_fine])
def test_rt_detr(criterion, build):
    """Equal to the model's own varifocal loss at epsilon 0, in value and gradient; else not."""
    model = build()
    losses, gradients = step(model)
    assert any("vfl" in name for name in losses) and len(gradients) > 4
    run("RT-DETR and D-FINE of transformers", change={"epsilon=1.0": "epsilon=0.0"})
    ours, our_gradients = step(model)
    assert ours.keys() == losses.keys()
    for name, value in losses.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=name)
    for ours_, theirs in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-6)
    run("RT-DETR and D-FINE of transformers")
    others, _ = step(model)
    for name, value in losses.items():
        assert torch.equal(others[name], value) == ("vfl" not in name), name


SHARDED = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from polyfocal import Poly1FocalLoss

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))
pictures, labels = torch.randn(8, 6), torch.randint(6, (8,))
loss = Poly1FocalLoss(use_sigmoid=True, epsilon=1.0)
whole = loss(model(pictures), labels, avg_factor=4.0)
expected = torch.autograd.grad(whole, list(model.parameters()))
mesh = init_device_mesh("cpu", (2,))
for layer in (model[0], model[2], model):
    fully_shard(layer, mesh=mesh)
mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
loss(model(pictures[mine]), labels[mine], avg_factor=2.0).backward()
for parameter, gradient in zip(model.parameters(), expected):
    assert parameter.grad.to_local().shape != gradient.shape
    torch.testing.assert_close(parameter.grad.full_tensor(), gradient)
dist.destroy_process_group()
"""


def test_two_processes_of_fsdp_are_one_with_the_whole_batch(tmp_path):
    """Each divides by the mean of the two factors, as with DistributedDataParallel."""
    reason = "needs fully_shard, which torch has since 2.6"
    pytest.importorskip("torch.distributed.fsdp", reason=reason)
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip(reason)
    file = tmp_path / "sharded.py"
    file.write_text(SHARDED)
    # It ends both processes where one fails.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
