from dataclasses import replace

from ns.reporting.context import gather_context
from ns.reporting.headlines import format_headline
from tests.reporting.conftest import RUN


def test_format_headline_is_of_test_images_if_all_models_have_them(unchanged):
    context = gather_context(unchanged, RUN, pictures=0)

    def format_with(*tests: dict[str, float]) -> str:
        models = [
            replace(model, evaluations={"evaluation": model.evaluation.model_copy(update={"top1": top1})} | test)
            for model, top1, test in zip(context.models, (0.5, 0.625), tests, strict=True)
        ]
        return format_headline(replace(context, models=models))

    tests = [
        {"test": model.evaluation.model_copy(update={"top1": top1, "images": 4321})}
        for model, top1 in zip(context.models, (0.25, 0.75), strict=True)
    ]
    assert format_with(*tests) == "25.0 % → 75.0 % on 4,321 test images"
    assert format_with(tests[0], {}) == format_with({}, {}) == "50.0 % → 62.5 %"
