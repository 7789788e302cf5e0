//! What results may lie on, on any device: where each element is read by whoever writes it, first.

use super::spec::{Alias, ArgId, MatmulPart, MatmulSpec, NormSource, NormSpec};

/// A result may lie on a residual that has no other part in the matmul.
pub fn residuals(m: &MatmulSpec) -> Vec<Alias> {
    let alone = |read: &ArgId| {
        let of_part = |part: &MatmulPart| {
            [Some(part.weight), part.bias, part.residual]
                .into_iter()
                .filter(|arg| *arg == Some(*read))
                .count()
        };
        *read != m.x && m.parts.iter().map(of_part).sum::<usize>() == 1
    };
    let aliases = m
        .parts
        .iter()
        .filter_map(|part| Some(Alias { write: part.out?, read: part.residual.filter(alone)? }));
    aliases.collect()
}

/// The sum may lie on a summand that is not the weight too.
pub fn summands(m: &NormSpec) -> Vec<Alias> {
    let (NormSource::Sum { a, b }, Some(write)) = (&m.source, m.rows_out) else { return vec![] };
    let mut aliases: Vec<Alias> =
        [*a, *b].into_iter().filter(|read| *read != m.weight).map(|read| Alias { write, read }).collect();
    aliases.dedup();
    aliases
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_lies_on_summands_that_have_no_other_part() {
        let sum = |weight| NormSpec {
            source: NormSource::Sum { a: 0, b: 1 },
            n: 32,
            weight,
            eps: 1e-5,
            rows_out: Some(3),
            norm_out: None,
            quant_out: None,
        };
        let pairs = |m| summands(&m).into_iter().map(|a| (a.write, a.read)).collect::<Vec<_>>();
        assert_eq!(pairs(sum(2)), [(3, 0), (3, 1)]);
        assert_eq!(pairs(sum(1)), [(3, 0)]);
        assert_eq!(pairs(NormSpec { source: NormSource::Sum { a: 0, b: 0 }, ..sum(2) }), [(3, 0)]);
        assert_eq!(pairs(NormSpec { rows_out: None, ..sum(2) }), []);
    }
}
