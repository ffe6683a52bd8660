# The large anchor alone.
_base_ = [
    "../_base_/models/stitched_setr_tiny.py",
    "../_base_/datasets/shapes.py",
    "../_base_/schedules/schedule_tiny_300.py",
    "../_base_/default_runtime.py",
]
work_dir = "work_dirs/quickstart/anchor_l"
model = dict(
    backbone=dict(anchors=[dict(model="vit_tiny_patch16_224", patch_size=8, embed_dim=128, depth=12, num_heads=4)])
)
