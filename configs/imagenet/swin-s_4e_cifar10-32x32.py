# The small anchor alone.
_base_ = "vit-l_4e_cifar10-32x32.py"
work_dir = "work_dirs/cifar10/swin_s"
model = dict(
    backbone=dict(
        anchors=[
            dict(
                model="swin_tiny_patch4_window7_224",
                patch_size=2,
                window_size=4,
                embed_dim=24,
                depths=(1, 1, 2, 1),
                num_heads=(1, 2, 4, 8),
            ),
        ]
    )
)
