# CIFAR-100 in data/cifar-100-python. Recipe: that of the noised top-K paper for CIFAR-100 (300
# epochs of SGD, batch 64, rate 0.1 divided by 10 at 151 and 226, K = 5), on ResNet-32.
default_scope = "mmengine"
data_root = "data/cifar-100-python"
topk = 5

model = dict(
    type="polyfocal.Classifier",
    data_preprocessor=dict(
        type="polyfocal.ImagePreprocessor",
        mean=(129.3, 124.1, 112.4),
        std=(68.2, 65.4, 70.4),
        padding=4,
        flip=True,
    ),
    backbone=dict(type="polyfocal.CifarResNet", depth=32, base_channels=16),
    in_channels=64,
    num_classes=100,
    loss=dict(type="polyfocal.FocalLoss", use_sigmoid=False, gamma=0.0, alpha=None),
)

train_dataloader = dict(
    batch_size=64,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(type="polyfocal.ImageDataset", split="train"),
)
val_dataloader = dict(
    batch_size=250,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="polyfocal.ImageDataset", split="val"),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="polyfocal.ClassificationMetric", class_counts=None)
test_evaluator = val_evaluator

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=300, val_interval=10)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
)
param_scheduler = [dict(type="MultiStepLR", by_epoch=True, milestones=[151, 226], gamma=0.1)]
auto_scale_lr = dict(enable=False, base_batch_size=64)

default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", interval=10, max_keep_ckpts=2),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
custom_hooks = [dict(type="polyfocal.StoredScoresHook")]  # for losses that debias with them
visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
log_processor = dict(type="LogProcessor", window_size=50, by_epoch=True)
