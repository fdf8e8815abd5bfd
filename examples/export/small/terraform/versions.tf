# Made by: diffplan export plan.json --to all --cluster cluster.yaml --out DIR
# Plan: c9e1919b1b40d854fc8b9fe116277756a5c74572aa98aaf18e6716f740e810a4 (scenario small, diffplan 0.1.0)
# Profile: h200, id 1fe1630165f8
# Prices: 2026-11, 2026-11-22, 3.5 USD per GPU-hour (on_demand)
terraform {
  required_version = ">= 1.3"
}
