"""scikit-learn's cross-validation and grid search over PrefixClassifier."""

import numpy as np
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score

from gdpd import PrefixClassifier


def series(cases, length=24, seed=0):
    """Sines of either sign under noise: X [cases, 1, length] and y [cases]."""
    rng = np.random.default_rng(seed)
    y = np.arange(cases) % 2
    wave = np.sin(np.linspace(0, 6, length))
    return 0.5 * rng.normal(size=(cases, 1, length)) + wave * (2 * y - 1)[:, None, None], y


def main(epochs=40, cases=48):
    """Returns the accuracies of the folds, and the fitted search over the earliness."""
    X, y = series(cases)
    small = {"hidden": 16, "layers": 1}
    classifier = PrefixClassifier(
        method="gdpd",
        earliness=0.5,  # decide after the first half
        teacher_model="lstm",
        student_model="lstm",
        teacher_options=small,
        student_options=small,
        epochs=epochs,
        teacher_epochs=epochs,
        random_state=0,
    )
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    scores = cross_val_score(classifier, X, y, cv=folds)
    search = GridSearchCV(classifier, {"earliness": [0.2, 0.5]}, cv=folds).fit(X, y)
    return scores, search


if __name__ == "__main__":
    scores, search = main()
    print(f"accuracy {scores.mean():.2f} ± {scores.std():.2f}; best earliness {search.best_params_['earliness']}")
