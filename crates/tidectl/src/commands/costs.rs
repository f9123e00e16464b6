//! `costs`.

use super::Context;
use crate::Result;
use crate::output::table;
use serde_json::json;

pub(super) fn run(context: &mut Context) -> Result<()> {
    let mut client = context.connect()?;
    let (frequency, costs) = client.costs()?;
    client.close();
    let us = |ticks: u64| ticks as f64 * 1e6 / frequency.max(1) as f64;
    let json = json!({
        "schema": 1,
        "costs": costs.iter().map(|cost| json!({
            "task": cost.task.to_string(),
            "times": cost.times,
            "total_us": us(cost.ticks),
            "longest_us": us(cost.longest),
        })).collect::<Vec<_>>(),
    });
    context.ui.data(&json, || {
        let mut rows = vec![
            ["TASK", "TIMES", "TOTAL", "LONGEST"]
                .map(String::from)
                .to_vec(),
        ];
        rows.extend(costs.iter().map(|cost| {
            vec![
                cost.task.to_string(),
                cost.times.to_string(),
                format!("{:.1} us", us(cost.ticks)),
                format!("{:.1} us", us(cost.longest)),
            ]
        }));
        table(&rows)
    })
}
