"""Export stitches to ONNX or torch.export, with one file of weights, and run the exports."""
