// oidc-provider as a test authorization server over https, on free loopback ports: node oidc-provider.mjs CONFIG
// CONFIG is JSON: {tls: {key, cert}, certificates: {k1, k2}}, each the path of a PEM file, and keySets: [paths].
// Prints one line of JSON {"issuers": {"plain", "fapi"}} when it is up, then {"refused": why} for each refusal.
import { createHash, generateKeyPairSync, X509Certificate } from 'node:crypto';
import fs from 'node:fs';
import https from 'node:https';
import Provider from 'oidc-provider';

process.stdin.resume().on('end', () => process.exit()); // a killed test run leaves no server behind
const config = JSON.parse(process.argv[2]);
const read = (path) => fs.readFileSync(path, 'utf8');
const print = (value) => console.log(JSON.stringify(value));
const JWKS_PATH = '/registered/jwks';

// What an operator registers: the certificate that the client sent, as a JWK
function jwk(pem, kid) {
  const certificate = new X509Certificate(pem);
  return {
    ...certificate.publicKey.export({ format: 'jwk' }),
    use: 'sig',
    alg: 'ES256',
    x5c: [certificate.raw.toString('base64')],
    'x5t#S256': createHash('sha256').update(certificate.raw).digest('base64url'),
    ...(kid ? { kid } : {}),
  };
}

const k1 = read(config.certificates.k1);
const k2 = read(config.certificates.k2);
const serverKey = {
  ...generateKeyPairSync('ec', { namedCurve: 'P-256' }).privateKey.export({ format: 'jwk' }),
  kid: 'as1', use: 'sig', alg: 'ES256',
};

function provider(issuer, fapi) {
  const client = (client_id, keys) => ({
    client_id,
    ...keys,
    grant_types: ['client_credentials'],
    redirect_uris: [],
    response_types: [],
    token_endpoint_auth_method: 'private_key_jwt',
    token_endpoint_auth_signing_alg: 'ES256',
    id_token_signed_response_alg: 'ES256', // the server's only key is an EC one
    scope: 'das-api/das-access das-api/office-exchange',
  });
  const made = new Provider(issuer, {
    scopes: ['das-api/das-access', 'das-api/office-exchange', 'das-api/other'],
    clientAuthMethods: ['private_key_jwt', 'client_secret_basic'],
    enabledJWA: { clientAuthSigningAlgValues: ['ES256', 'ES384', 'RS256', 'PS256', 'EdDSA'] },
    clients: [
      client('one-key', { jwks: { keys: [jwk(k1)] } }),
      client('two-keys', { jwks: { keys: [jwk(k1, 'k1'), jwk(k2, 'k2')] } }),
      client('key-sets', { jwks: { keys: config.keySets.flatMap((path) => JSON.parse(read(path)).keys) } }),
      client('jwks-uri', { jwks_uri: `${issuer}${JWKS_PATH}` }),
      {
        client_id: 'rs', client_secret: 'rs-secret', id_token_signed_response_alg: 'ES256',
        grant_types: [], redirect_uris: [], response_types: [],
      },
    ],
    features: {
      devInteractions: { enabled: false },
      clientCredentials: { enabled: true },
      introspection: { enabled: true, allowedPolicy: () => true },
      ...(fapi ? { fapi: { enabled: true, profile: '2.0' } } : {}),
    },
    ttl: { ClientCredentials: 600 },
    fetch: (url, { dispatcher, ...options }) => fetch(url, options), // the dispatcher refuses loopback
    jwks: { keys: [serverKey] },
    cookies: { keys: ['unused'] },
  });
  made.on('grant.error', (_, error) => print({ refused: error.error_detail ?? error.error_description }));
  made.on('server_error', (_, error) => print({ broken: error.message }));
  return made;
}

async function listen(fapi) {
  let answer;
  const server = https.createServer({ key: read(config.tls.key), cert: read(config.tls.cert) }, (request, response) => {
    if (request.url !== JWKS_PATH) return answer(request, response);
    response.setHeader('content-type', 'application/json');
    return response.end(JSON.stringify({ keys: [jwk(k1, 'k1')] }));
  });
  await new Promise((resolve) => { server.listen(0, '127.0.0.1', resolve); });
  const issuer = `https://localhost:${server.address().port}`;
  answer = provider(issuer, fapi).callback();
  return issuer;
}

print({ issuers: { plain: await listen(false), fapi: await listen(true) } });
