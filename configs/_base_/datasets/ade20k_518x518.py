# ADE20K for patches of 14 pixels: everything at 518 = 37 x 14 where ade20k.py has 512.
_base_ = "ade20k.py"
crop_size = (518, 518)
sizes = dict(
    RandomResize=dict(scale=(2072, 518)),
    RandomCrop=dict(crop_size=crop_size),
    Resize=dict(scale=(2072, 518)),
)
train_pipeline = [dict(step, **sizes.get(step["type"], {})) for step in _base_.train_pipeline]
test_pipeline = [dict(step, **sizes.get(step["type"], {})) for step in _base_.test_pipeline]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
