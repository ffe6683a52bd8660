# Three anchors stitched, neighbour by neighbour.
_base_ = "stitched-vit-s-l_setr_shapes-64x64.py"
work_dir = "work_dirs/quickstart/stitched_s-m-l"
model = dict(
    backbone=dict(
        anchors=[
            dict(
                model="vit_tiny_patch16_224",
                patch_size=8,
                embed_dim=32,
                depth=6,
                num_heads=2,
                pretrained="work_dirs/quickstart/anchor_s/iter_800.pth",
            ),
            dict(
                model="vit_tiny_patch16_224",
                patch_size=8,
                embed_dim=64,
                depth=8,
                num_heads=2,
                pretrained="work_dirs/quickstart/anchor_m/iter_800.pth",
            ),
            dict(
                model="vit_tiny_patch16_224",
                patch_size=8,
                embed_dim=128,
                depth=12,
                num_heads=4,
                pretrained="work_dirs/quickstart/anchor_l/iter_800.pth",
            ),
        ]
    )
)
