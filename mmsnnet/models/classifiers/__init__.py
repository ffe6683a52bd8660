from mmsnnet.models.classifiers.stitched_classifier import StitchedClassifier

__all__ = ["StitchedClassifier"]
