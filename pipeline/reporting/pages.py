"""How every HTML page is rendered: from the templates beside this module, with all text from data escaped."""

from jinja2 import Environment, PackageLoader, StrictUndefined


def page_environment() -> Environment:
    """Escaping on; a name that a template misspells is an error instead of nothing."""
    return Environment(
        loader=PackageLoader("pipeline.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
