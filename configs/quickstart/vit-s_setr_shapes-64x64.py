# The small anchor alone.
_base_ = "vit-l_setr_shapes-64x64.py"
work_dir = "work_dirs/quickstart/anchor_s"
model = dict(
    backbone=dict(
        anchors=[dict(model="vit_tiny_patch16_224", patch_size=8, embed_dim=32, depth=6, num_heads=2)],
        out_indices=dict(train=(3, 5), test=(5,)),
    ),
    decode_head=dict(in_channels=32),
    auxiliary_head=dict(in_channels=32),
)
