"""Scripted experts for ManiSkill tasks."""
