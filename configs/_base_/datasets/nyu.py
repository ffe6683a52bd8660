# NYUv2 at 640 x 480: images/{train,test}/<scene>_*.jpg, and annotations/{train,test}/<scene>_*.png of the same names,
# 16-bit, in millimetres, 0 where nothing was measured.
dataset_type = "NYUDataset"
data_root = "data/nyu"
meta_keys = (
    "img_path",
    "depth_map_path",
    "ori_shape",
    "img_shape",
    "pad_shape",
    "scale_factor",
    "flip",
    "flip_direction",
)
train_pipeline = [
    dict(type="mmsnnet.LoadImage"),
    dict(type="mmsnnet.LoadDepth"),
    dict(type="mmsnnet.NYUCrop"),
    dict(type="RandomRotate", prob=0.5, degree=2.5, seg_pad_val=0),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomCrop", crop_size=(416, 544)),
    dict(type="mmsnnet.RandomColor"),
    dict(type="PackSegInputs", meta_keys=meta_keys),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),  # by this name mmseg's inferencers find it
    dict(type="mmsnnet.LoadDepth"),
    dict(type="PackSegInputs", meta_keys=meta_keys),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path="images/train", depth_map_path="annotations/train"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        test_mode=True,
        data_prefix=dict(img_path="images/test", depth_map_path="annotations/test"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
# Eigen's crop, over depths from 1 mm to 10 m.
val_evaluator = dict(type="DepthMetric", min_depth_eval=1e-3, max_depth_eval=10.0, crop_type="nyu_crop")
test_evaluator = val_evaluator
