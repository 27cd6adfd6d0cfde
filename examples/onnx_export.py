"""The deployed student as an ONNX file, checked against the classifier (pip install "gdpd-kernels[cli,onnx]")."""

import numpy as np
import onnxruntime
import torch

from gdpd import PrefixClassifier


class Probabilities(torch.nn.Module):
    """x [batch, channels, prefix] to probabilities [batch, classes]: a classifier's student, without its feature."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, x):
        return self.student(x)[1].softmax(dim=1)


def export(classifier, channels, path):
    """Write the student of a fitted classifier; the file takes batches of any size."""
    x = torch.zeros(2, channels, classifier.n_timepoints_prefix_)
    program = torch.onnx.export(
        Probabilities(classifier.student_).eval(),
        (x,),
        input_names=["x"],
        output_names=["probabilities"],
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
    )
    program.save(path)


def main(path="student.onnx", epochs=20, cases=40):
    """Returns the probabilities of the ONNX file and those of the classifier."""
    rng = np.random.default_rng(0)
    y = np.arange(cases) % 2
    X = 0.5 * rng.normal(size=(cases, 1, 24)) + np.sin(np.linspace(0, 6, 24)) * (2 * y - 1)[:, None, None]
    small = {"hidden": 16, "layers": 1}
    # Raw prefixes, not normalised: what else a classifier does to its input, a caller of the file has to do.
    classifier = PrefixClassifier(
        method="gdpd", earliness=0.5, normalisation="none", teacher_model="lstm", student_model="lstm",
        teacher_options=small, student_options=small, epochs=epochs, teacher_epochs=epochs, random_state=0,
    ).fit(X, y)  # fmt: skip
    export(classifier, 1, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    prefix = X[:, :, : classifier.n_timepoints_prefix_].astype(np.float32)
    return session.run(None, {"x": prefix})[0], classifier.predict_proba(X)


if __name__ == "__main__":
    found, expected = main()
    print(f"largest difference of a probability: {np.abs(found - expected).max():.1e}")
