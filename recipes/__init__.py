"""Recipes for ecmoe-finetune, configs for Accelerate, a task for lm-evaluation-harness."""
