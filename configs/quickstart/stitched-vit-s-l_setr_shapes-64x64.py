# Both anchors stitched: every stitch is trained in this one run.
_base_ = [
    "../_base_/models/stitched_setr_tiny.py",
    "../_base_/datasets/shapes.py",
    "../_base_/schedules/schedule_tiny_300.py",
    "../_base_/default_runtime.py",
]
work_dir = "work_dirs/quickstart/stitched"
model = dict(
    backbone=dict(
        anchors=[
            dict(
                model="vit_tiny_patch16_224",
                patch_size=8,
                embed_dim=64,
                depth=6,
                num_heads=2,
                pretrained="work_dirs/quickstart/anchor_s/iter_300.pth",
            ),
            dict(
                model="vit_tiny_patch16_224",
                patch_size=8,
                embed_dim=128,
                depth=12,
                num_heads=4,
                pretrained="work_dirs/quickstart/anchor_l/iter_300.pth",
            ),
        ],
        flops_step=20e6,
    )
)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
