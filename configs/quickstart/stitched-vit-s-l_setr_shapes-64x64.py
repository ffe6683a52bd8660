# Both anchors stitched: every stitch is trained in this one run.
_base_ = "vit-l_setr_shapes-64x64.py"
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
                pretrained="work_dirs/quickstart/anchor_s/iter_600.pth",
            ),
            dict(
                model="vit_tiny_patch16_224",
                patch_size=8,
                embed_dim=128,
                depth=12,
                num_heads=4,
                pretrained="work_dirs/quickstart/anchor_l/iter_600.pth",
            ),
        ],
        rank=8,
        flops_step=20e6,
    )
)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
