# The small anchor alone.
_base_ = "vit-l_4e_cifar10-32x32.py"
work_dir = "work_dirs/cifar10/anchor_s"
model = dict(
    backbone=dict(
        anchors=[dict(model="vit_tiny_patch16_224", patch_size=4, embed_dim=64, depth=6, num_heads=2)],
    )
)
