"""The reward as other people's trainers call it: flow_grpo, verl-omni, and whatever calls HPSv3.

Each module has the names, arguments and return values that its trainer expects, so that nothing in the
trainer changes but a line of configuration or an import. `docs/guides/integrations.md` has these lines. No
trainer is imported before it is asked for, and none is a dependency.
"""
