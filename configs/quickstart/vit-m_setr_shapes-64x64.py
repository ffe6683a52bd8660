# An anchor between the small and the large one, alone.
_base_ = "vit-l_setr_shapes-64x64.py"
work_dir = "work_dirs/quickstart/anchor_m"
model = dict(
    backbone=dict(
        anchors=[dict(model="vit_tiny_patch16_224", patch_size=8, embed_dim=64, depth=8, num_heads=2)],
        out_indices=dict(train=(4, 7), test=(7,)),
    ),
    decode_head=dict(in_channels=64),
    auxiliary_head=dict(in_channels=64),
)
