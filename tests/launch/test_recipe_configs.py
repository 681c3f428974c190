"""The shipped recipes are the published ones, and go with any model and run."""

import pytest

from launch.configure import SHIPPED, build_run
from pjit_train.errors import UserError
from sparsity import recipes
from sparsity.api import ALGORITHMS
from sparsity.pruning import Pruning
from sparsity.recipes import Recipe

FOLDER = SHIPPED / "configs" / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.gin"))
QUICK = str(SHIPPED / "configs" / "quickstart.gin")


def run_with(name: str, *bindings: str):
    return build_run([QUICK, str(FOLDER / f"{name}.gin")], list(bindings))[0]


@pytest.mark.parametrize("name", [name for name in NAMES if hasattr(recipes, name)])
def test_a_recipe_is_that_of_the_function_of_its_name(name):
    assert run_with(name).sparsity == getattr(recipes, name)()


def test_every_published_recipe_and_every_algorithm_has_a_configuration():
    runs = {name: run_with(name) for name in NAMES}
    made = {name: run.sparsity for name, run in runs.items() if run.quantization is None}
    published = {"sr_ste", "mask_decay", "structure_decay", "mdgf_linear", "mdgf_exponential"}
    published |= {"sdgf_stepwise", "sdgf_geometric", "step", "asp"}
    assert {name for name, recipe in made.items() if isinstance(recipe, Recipe)} == published
    algorithms = {recipe.algorithm for recipe in made.values() if isinstance(recipe, Pruning)}
    without = {"no_prune", "random_ste", "global_saliency"}  # variants of others, by one binding
    assert algorithms == set(ALGORITHMS) - without


def test_patterns_by_kind_of_layer_are_one_binding():
    layers = "{'feed_forward': '1:8', 'attention/(query|key)': '1:4'}"
    run = run_with("sr_ste", f"recipes.Recipe.layers = {layers}")
    assert run.sparsity.layers == {"feed_forward": "1:8", "attention/(query|key)": "1:4"}


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("recipes.Recipe.layers = {'feed_forward': '4:2'}", r"keeps 4 of every 2"),
        ("recipes.Recipe.dense_fraction = 0.95", r"more than the whole run"),
        ("recipes.Recipe.gradient = 'mask'", r"gradient.*'mask'.*straight_through"),
        ("recipes.Recipe.fine_tune_fracton = 0.1", r"fine_tune_fraction"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line(binding, message):
    with pytest.raises(UserError, match=message) as error:
        run_with("mdgf_linear", binding)
    assert "\n" not in str(error.value)


def test_a_mistake_in_pruning_is_one_line():
    with pytest.raises(UserError, match=r"start_fraction=0.8 and end_fraction=0.75"):
        run_with("magnitude", "pruning.Pruning.start_fraction = 0.8")
